//! `#[task]`.

use proc_macro2::TokenStream;
use quote::{format_ident, quote, quote_spanned};
use syn::spanned::Spanned as _;
use syn::{FnArg, Ident, ItemFn, Pat, ReturnType, Type};

use crate::args::{Kind, Parameter, check, implementation, kind};
use crate::options::Options;

/// Field of the task's type.
struct State {
    name: Ident,
    ty: Type,
    is_borrowed: bool,
}

/// Parameters of the function, by their roles.
#[derive(Default)]
struct Roles {
    parameters: Vec<Parameter>,
    states: Vec<State>,
    context: Option<Ident>,
}

pub(crate) fn expand(options: &Options, mut function: ItemFn) -> syn::Result<TokenStream> {
    let signature = &function.sig;
    if signature.asyncness.is_none() {
        let text = "a task is an `async fn`; put blocking work into `tokio::task::spawn_blocking`";
        return Err(syn::Error::new(signature.fn_token.span(), text));
    }
    if !signature.generics.params.is_empty() {
        let text = "a task has one signature: generic parameters and lifetimes are not possible";
        return Err(syn::Error::new(signature.generics.span(), text));
    }
    let mut roles = roles(&mut function)?;
    check(&mut roles.parameters)?;

    let ItemFn {
        attrs,
        vis,
        sig,
        block,
        ..
    } = &function;
    let name = &sig.ident;
    let task_name = options.name.clone().unwrap_or_else(|| name.to_string());
    let function_name = name.to_string();
    let (bind, setters) = (options.bind, &options.setters);
    let arguments = format_ident!("__{}_arguments", name);
    let (names, types): (Vec<_>, Vec<_>) =
        roles.parameters.iter().map(|p| (&p.name, &p.ty)).unzip();
    let args_implementation = implementation(&quote!(#arguments), &roles.parameters);
    let (output, span) = match &sig.output {
        ReturnType::Default => (quote!(()), sig.ident.span()),
        ReturnType::Type(_, ty) => (quote!(#ty), ty.span()),
    };
    let returned = quote_spanned!(span=> <#output as ::celery_worker::__private::TaskReturn>);
    let context = match &roles.context {
        Some(context) => quote!(#context),
        None => quote!(_cx),
    };
    let state_fields = roles.states.iter().map(|State { name, ty, .. }| {
        let doc = format!("State `{name}` of the task.");
        quote!(#[doc = #doc] pub #name: #ty)
    });
    let states = roles.states.iter().map(|state| {
        let State {
            name, is_borrowed, ..
        } = state;
        match is_borrowed {
            true => quote!(let #name = &self.#name;),
            false => quote!(let #name = ::core::clone::Clone::clone(&self.#name);),
        }
    });
    let definition = match roles.states.is_empty() {
        true => quote!(#[derive(Clone, Copy, Debug)] #vis struct #name;),
        false => quote!(#vis struct #name { #(#state_fields),* }),
    };
    // Documentation belongs to the type; lint levels and the like belong to the code.
    let (docs, others): (Vec<_>, Vec<_>) = attrs
        .iter()
        .partition(|attribute| attribute.path().is_ident("doc"));
    let signature_function = signature_function(&roles.parameters, &task_name, vis);

    Ok(quote! {
        #(#docs)*
        #[allow(non_camel_case_types)]
        #definition

        #[doc(hidden)]
        #[allow(non_camel_case_types)]
        pub struct #arguments { #(#names: #types),* }

        #args_implementation

        impl ::celery_worker::task::Task for #name {
            const NAME: &'static str = #task_name;
            const FUNCTION: &'static str = #function_name;
            const BIND: bool = #bind;
            const OPTIONS: ::celery_worker::task::TaskOptions =
                ::celery_worker::task::TaskOptions::DEFAULT #(.#setters)*;
            type Args = #arguments;
            type Output = #returned::Output;

            #(#others)*
            async fn run(
                &self,
                arguments: #arguments,
                #context: ::celery_worker::task::TaskContext,
            ) -> ::celery_worker::task::TaskResult<Self::Output> {
                #(#states)*
                let #arguments { #(#names),* } = arguments;
                let returned: #output = async move #block.await;
                #returned::into_task_result(returned)
            }
        }

        impl #name {
            #signature_function
        }
    })
}

/// Sorts the parameters of a function and removes their attributes.
fn roles(function: &mut ItemFn) -> syn::Result<Roles> {
    let mut roles = Roles::default();
    for argument in &mut function.sig.inputs {
        let FnArg::Typed(argument) = argument else {
            let text =
                "a task has no `self`: use `#[state]` parameters, or implement `Task` for a type";
            return Err(syn::Error::new(argument.span(), text));
        };
        let Pat::Ident(pattern) = &*argument.pat else {
            let text = "a parameter of a task is a name, not a pattern";
            return Err(syn::Error::new(argument.pat.span(), text));
        };
        let name = pattern.ident.clone();
        let is_state = argument.attrs.iter().any(|a| a.path().is_ident("state"));
        if is_state {
            let (ty, is_borrowed) = match &*argument.ty {
                Type::Reference(reference) => ((*reference.elem).clone(), true),
                ty => (ty.clone(), false),
            };
            roles.states.push(State {
                name,
                ty,
                is_borrowed,
            });
            continue;
        }
        if is_context(&argument.ty) {
            if roles.context.replace(name).is_some() {
                let text = "a task has one context";
                return Err(syn::Error::new(argument.ty.span(), text));
            }
            continue;
        }
        if let Type::Reference(reference) = &*argument.ty {
            let text = "an argument comes from a message, so it is an owned value: use `String` for `&str`, `Vec<T>` for `&[T]`";
            return Err(syn::Error::new(reference.span(), text));
        }
        let mut parameter = Parameter::plain(name, (*argument.ty).clone());
        for attribute in &argument.attrs {
            if let Some(kind) = kind(attribute)? {
                parameter.kind = kind;
            } else if attribute.path().is_ident("keyword_only") {
                parameter.is_keyword_only = true;
            } else if !attribute.path().is_ident("doc") {
                let text = "expected `#[default]`, `#[args]`, `#[kwargs]`, `#[keyword_only]` or `#[state]`";
                return Err(syn::Error::new(attribute.span(), text));
            }
        }
        roles.parameters.push(parameter);
    }
    Ok(roles)
}

fn is_context(ty: &Type) -> bool {
    match ty {
        Type::Path(path) => {
            let last = path.path.segments.last();
            last.is_some_and(|segment| segment.ident == "TaskContext")
        }
        _ => false,
    }
}

/// `s(…)`: a signature of the task.
fn signature_function(
    parameters: &[Parameter],
    task_name: &str,
    vis: &syn::Visibility,
) -> TokenStream {
    let (names, types): (Vec<_>, Vec<_>) = parameters.iter().map(|p| (&p.name, &p.ty)).unzip();
    let steps: Vec<_> = parameters
        .iter()
        .map(|parameter| {
            let (name, key) = (&parameter.name, parameter.python_name());
            match parameter.kind {
                Kind::VarArgs => {
                    quote!(for value in #name { signature = signature.arg(value); })
                }
                Kind::VarKwargs => {
                    quote!(for (key, value) in #name { signature = signature.kwarg(key, value); })
                }
                _ if parameter.is_keyword_only => quote!(signature = signature.kwarg(#key, #name);),
                _ => quote!(signature = signature.arg(#name);),
            }
        })
        .collect();
    let mutability = (!parameters.is_empty()).then(|| quote!(mut));
    quote! {
        /// A signature of this task with the given arguments, to be sent by a client or by another task.
        #[must_use]
        #[allow(dead_code, reason = "tasks can be run without being sent")]
        #vis fn s(#(#names: #types),*) -> ::celery_worker::prelude::Signature {
            let #mutability signature = ::celery_worker::prelude::Signature::new(#task_name);
            #(#steps)*
            signature
        }
    }
}

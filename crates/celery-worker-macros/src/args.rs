//! Parameters of a task, from the fields of a struct or from the parameters of a function.

use proc_macro2::TokenStream;
use quote::{quote, quote_spanned};
use syn::spanned::Spanned as _;
use syn::{Attribute, Data, DeriveInput, Expr, Fields, Ident, Meta, Token, Type};

/// Form in which a call gives a parameter.
pub(crate) enum Kind {
    Required,
    Default(TokenStream),
    VarArgs,
    VarKwargs,
}

/// A parameter.
pub(crate) struct Parameter {
    pub(crate) name: Ident,
    pub(crate) ty: Type,
    pub(crate) kind: Kind,
    /// True if a call can give it by name only.
    pub(crate) is_keyword_only: bool,
}

impl Parameter {
    /// A parameter without attributes: optional if its type is an `Option`.
    pub(crate) fn plain(name: Ident, ty: Type) -> Self {
        let kind = match is_option(&ty) {
            true => Kind::Default(quote!(::core::option::Option::None)),
            false => Kind::Required,
        };
        Self {
            name,
            ty,
            kind,
            is_keyword_only: false,
        }
    }

    /// Its name in Python.
    pub(crate) fn python_name(&self) -> String {
        let name = self.name.to_string();
        name.strip_prefix("r#").unwrap_or(&name).to_owned()
    }
}

/// Checks the order of parameters, as Python does, and marks those behind `*args` as keyword-only.
pub(crate) fn check(parameters: &mut [Parameter]) -> syn::Result<()> {
    let (mut has_default, mut has_var_args, mut has_var_kwargs) = (false, false, false);
    let mut has_keyword_only = false;
    for parameter in parameters {
        let refuse = |text| Err(syn::Error::new(parameter.name.span(), text));
        if has_var_kwargs {
            return refuse("no parameter can follow `#[kwargs]`");
        }
        let is_named = matches!(parameter.kind, Kind::Required | Kind::Default(_));
        if parameter.is_keyword_only && !is_named {
            return refuse("`#[keyword_only]` is for a parameter with a name of its own");
        }
        parameter.is_keyword_only |= has_var_args && is_named;
        if has_keyword_only && is_named && !parameter.is_keyword_only {
            return refuse("a parameter behind a keyword-only one is `#[keyword_only]`, too");
        }
        has_keyword_only |= parameter.is_keyword_only;
        match &parameter.kind {
            Kind::Required if has_default && !parameter.is_keyword_only => {
                return refuse(
                    "a required parameter cannot follow one with a default: give it a default too, or move it",
                );
            }
            Kind::Required => {}
            Kind::Default(_) => has_default |= !parameter.is_keyword_only,
            Kind::VarArgs if has_keyword_only => {
                return refuse("`#[args]` stands before the keyword-only parameters");
            }
            Kind::VarArgs if has_var_args => return refuse("there is another `#[args]`"),
            Kind::VarArgs => has_var_args = true,
            Kind::VarKwargs => has_var_kwargs = true,
        }
    }
    Ok(())
}

/// `impl TaskArgs for target`, whose fields are the parameters.
pub(crate) fn implementation(target: &TokenStream, parameters: &[Parameter]) -> TokenStream {
    let declared: Vec<_> = parameters
        .iter()
        .map(|parameter| {
            let name = parameter.python_name();
            let keyword_only = parameter.is_keyword_only.then(|| quote!(.keyword_only()));
            let path = quote!(::celery_worker::task::Parameter);
            match parameter.kind {
                Kind::Required => quote!(#path::required(#name)#keyword_only),
                Kind::Default(_) => quote!(#path::optional(#name)#keyword_only),
                Kind::VarArgs => quote!(#path::var_args(#name)),
                Kind::VarKwargs => quote!(#path::var_kwargs(#name)),
            }
        })
        .collect();
    let fields = parameters.iter().map(|parameter| {
        let (field, name) = (&parameter.name, parameter.python_name());
        // The span of the type, so that a type which cannot be deserialized is the one underlined.
        let span = parameter.ty.span();
        match &parameter.kind {
            Kind::Required => quote_spanned!(span=> #field: bound.required(#name)?),
            Kind::Default(value) => {
                quote_spanned!(span=> #field: bound.optional(#name, || #value)?)
            }
            Kind::VarArgs => quote_spanned!(span=> #field: bound.var_args()?),
            Kind::VarKwargs => quote_spanned!(span=> #field: bound.var_kwargs()?),
        }
    });
    let bound = match parameters.is_empty() {
        true => quote!(_bound),
        false => quote!(bound),
    };
    quote! {
        #[automatically_derived]
        impl ::celery_worker::task::TaskArgs for #target {
            const PARAMETERS: &'static [::celery_worker::task::Parameter] = &[#(#declared),*];

            fn from_bound(
                #bound: ::celery_worker::task::Arguments<'_>,
            ) -> ::core::result::Result<Self, ::celery_worker::__private::JsonError> {
                ::core::result::Result::Ok(Self { #(#fields),* })
            }
        }
    }
}

/// `#[derive(TaskArgs)]`.
pub(crate) fn derive(input: &DeriveInput) -> syn::Result<TokenStream> {
    let Data::Struct(data) = &input.data else {
        let text = "arguments must be a struct, with a field for each parameter of the task";
        return Err(syn::Error::new(input.ident.span(), text));
    };
    let fields = match &data.fields {
        Fields::Named(fields) => fields.named.iter().collect(),
        Fields::Unit => Vec::new(),
        Fields::Unnamed(_) => {
            let text = "arguments have names: use a struct with named fields";
            return Err(syn::Error::new(input.ident.span(), text));
        }
    };
    if !input.generics.params.is_empty() {
        let text = "arguments have no generic parameters: a task has one signature";
        return Err(syn::Error::new(input.generics.span(), text));
    }
    let mut parameters = Vec::new();
    for field in fields {
        let Some(name) = field.ident.clone() else {
            continue;
        };
        let mut parameter = Parameter::plain(name, field.ty.clone());
        for attribute in field.attrs.iter().filter(|a| a.path().is_ident("arg")) {
            attribute.parse_nested_meta(|meta| {
                parameter.kind = if meta.path.is_ident("default") {
                    match meta.input.peek(Token![=]) {
                        true => {
                            let value: Expr = meta.value()?.parse()?;
                            Kind::Default(quote!(#value))
                        }
                        false => Kind::Default(quote!(::core::default::Default::default())),
                    }
                } else if meta.path.is_ident("args") {
                    Kind::VarArgs
                } else if meta.path.is_ident("kwargs") {
                    Kind::VarKwargs
                } else if meta.path.is_ident("keyword_only") {
                    parameter.is_keyword_only = true;
                    return Ok(());
                } else {
                    let text =
                        "expected `default`, `default = …`, `args`, `kwargs` or `keyword_only`";
                    return Err(meta.error(text));
                };
                Ok(())
            })?;
        }
        parameters.push(parameter);
    }
    check(&mut parameters)?;
    let name = &input.ident;
    Ok(implementation(&quote!(#name), &parameters))
}

/// The kind that an attribute gives to a parameter of a function; `None` for an attribute of another kind.
pub(crate) fn kind(attribute: &Attribute) -> syn::Result<Option<Kind>> {
    let path = attribute.path();
    if path.is_ident("args") {
        Ok(Some(Kind::VarArgs))
    } else if path.is_ident("kwargs") {
        Ok(Some(Kind::VarKwargs))
    } else if path.is_ident("default") {
        match &attribute.meta {
            Meta::Path(_) => Ok(Some(Kind::Default(quote!(
                ::core::default::Default::default()
            )))),
            Meta::NameValue(pair) => {
                let value = &pair.value;
                Ok(Some(Kind::Default(quote!(#value))))
            }
            Meta::List(list) => Err(syn::Error::new(list.span(), "write `#[default = value]`")),
        }
    } else {
        Ok(None)
    }
}

fn is_option(ty: &Type) -> bool {
    match ty {
        Type::Path(path) => {
            let last = path.path.segments.last();
            last.is_some_and(|segment| segment.ident == "Option")
        }
        _ => false,
    }
}

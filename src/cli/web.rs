//! `web`: serves the status page.

use std::net::SocketAddr;
use std::path::PathBuf;
use std::process::ExitCode;

use clap::Args;
use secrecy::ExposeSecret as _;

use super::{CliError, Context};
use crate::web::{self, BasePath, Token, TokenError, Web};
use celery_worker::worker::Shutdown;
use celery_worker_cli::ProcessError;
use celery_worker_cli::health::{HealthRegistry, Phase};
use celery_worker_cli::http::HttpServer;
use service_connection::error_chain::chain;

#[derive(Debug, Args)]
pub(super) struct WebArguments {
    /// Address and port to listen on. One that is not of this host alone needs a token.
    #[arg(long, value_name = "ADDRESS", default_value = "127.0.0.1:9809")]
    listen: SocketAddr,

    /// Path below which a reverse proxy serves the page, e.g. /status.
    #[arg(long, value_name = "PATH", default_value = "")]
    base_path: BasePath,

    /// File with the token that requests must contain, readable by its owner only; without it, http.page_token of the
    /// settings.
    #[arg(long, value_name = "FILE")]
    token_file: Option<PathBuf>,
}

pub(super) async fn run(context: &Context, arguments: &WebArguments) -> Result<ExitCode, CliError> {
    let token = match &arguments.token_file {
        Some(path) => Some(Token::read(path).map_err(|error| no_token("--token-file", &error))?),
        None => token_of_settings(context)?,
    };
    if token.is_none() && !arguments.listen.ip().is_loopback() {
        return Err(CliError::usage(format!(
            "--listen {}: everyone on the network could read the page; add --token-file FILE, or listen on 127.0.0.1 \
             behind a reverse proxy",
            arguments.listen
        )));
    }
    let process = &context.process;
    // For the signals and systemd. Health and metrics are those of workers and managers.
    let health = HealthRegistry::new(process.program(), process.settings().http.stopped_after)?;
    let end = process
        .serve(&health, None, async |shutdown: Shutdown| {
            let web = Web::new(&context.settings, arguments.base_path.clone(), token);
            let pages = web::router(web.clone());
            let server = HttpServer::start("--listen", arguments.listen, pages)
                .await
                .map_err(ProcessError::from)?;
            // The first viewer need not wait for the connection to the database.
            tokio::spawn(async move { web.snapshots().overview().await });
            let address = server.address().unwrap_or(arguments.listen);
            tracing::info!(
                url = format!("http://{address}{}/", arguments.base_path),
                "status page open"
            );
            health.enter(Phase::Running);
            shutdown.requested().await;
            Ok::<_, CliError>(())
        })
        .await?;
    Ok(end.conclude(process)?)
}

/// Health, metrics and, if the settings say so, the status page on the side port of a worker or manager.
pub(super) async fn side_port(context: &Context) -> Result<(HealthRegistry, HttpServer), CliError> {
    let token = token_of_settings(context)?;
    let pages = || web::router(Web::new(&context.settings, BasePath::default(), token));
    Ok(context.process.health_with(pages).await?)
}

fn token_of_settings(context: &Context) -> Result<Option<Token>, CliError> {
    let token = &context.settings.http.page_token;
    if token.expose_secret().is_empty() {
        return Ok(None);
    }
    let token = Token::new(token.clone());
    token
        .map(Some)
        .map_err(|error| no_token("http.page_token", &error))
}

fn no_token(key: &str, error: &TokenError) -> CliError {
    CliError::configuration(format!("{key}: {}", chain(error)))
}

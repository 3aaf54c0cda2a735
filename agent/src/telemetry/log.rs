//! The agent's own log, on standard error; its level can be changed at run time.

use tracing_subscriber::{
    EnvFilter, Registry, layer::SubscriberExt as _, reload, util::SubscriberInitExt as _,
};

use crate::config::{Log, LogFormat};

#[derive(Clone)]
pub struct LogHandle(reload::Handle<EnvFilter, Registry>);

impl LogHandle {
    /// Takes effect at once; directives that do not parse change nothing.
    pub fn set(&self, directives: &str) -> Result<(), String> {
        self.0.reload(parse(directives)?).map_err(|e| e.to_string())
    }

    pub fn get(&self) -> String {
        self.0.with_current(ToString::to_string).unwrap_or_default()
    }
}

/// Starts logging; called once.
pub fn start(log: &Log) -> Result<LogHandle, String> {
    let (filter, handle) = reload::Layer::new(parse(&log.level)?);
    let layer = tracing_subscriber::fmt::layer().with_writer(std::io::stderr);
    let registry = tracing_subscriber::registry().with(filter);
    let result = match log.format {
        LogFormat::Text => registry.with(layer.with_ansi(false)).try_init(),
        LogFormat::Json => registry.with(layer.json().flatten_event(true)).try_init(),
    };
    result.map_err(|e| e.to_string())?;
    Ok(LogHandle(handle))
}

fn parse(directives: &str) -> Result<EnvFilter, String> {
    EnvFilter::builder()
        .parse(directives)
        .map_err(|e| format!("log.level `{directives}`: {e}; use info, or info,postern=debug"))
}

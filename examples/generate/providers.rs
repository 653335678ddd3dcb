//! Chooses the provider: by `--provider`, or else by the API key in the environment.

use std::path::PathBuf;
use std::time::Duration;

use clap::{Args, ValueEnum};
use throughline::provider::sim::Sim;
use throughline::{Error, ErrorKind, Provider};

#[derive(Clone, Copy, PartialEq, Eq, ValueEnum)]
enum Kind {
    Sim,
    Openai,
    Anthropic,
}

#[derive(Args)]
pub struct ProviderArgs {
    /// Provider [default: the one whose key is in the environment, else sim]
    #[arg(long, value_enum)]
    provider: Option<Kind>,

    /// Model [default: sim: sim-1, openai: gpt-4.1-mini, anthropic: claude-haiku-4-5]
    #[arg(long)]
    model: Option<String>,

    /// Simulated provider: requests per minute that it allows
    #[arg(long, default_value = "6000", value_parser = clap::value_parser!(u64).range(1..))]
    sim_rpm: u64,

    /// Simulated provider: latency in milliseconds
    #[arg(long, default_value = "300")]
    sim_latency: u64,

    /// Simulated provider: share of the calls that fail with HTTP 500, from 0 to 1
    #[arg(long, default_value = "0")]
    sim_errors: f64,

    /// Simulated provider: seed of replies, latencies and failures
    #[arg(long, default_value = "0")]
    sim_seed: u64,

    /// Simulated provider: file to which it appends a line for each billed call
    #[arg(long)]
    ledger: Option<PathBuf>,
}

pub struct Chosen {
    pub provider: Box<dyn Provider>,
    pub model: String,
    pub simulated: bool,
}

impl ProviderArgs {
    pub fn choose(&self) -> Result<Chosen, Error> {
        let set = |name| std::env::var_os(name).is_some_and(|value| !value.is_empty());
        let kind = self.provider.unwrap_or_else(|| {
            if set("OPENAI_API_KEY") || set("OPENAI_BASE_URL") {
                Kind::Openai
            } else if set("ANTHROPIC_API_KEY") {
                Kind::Anthropic
            } else {
                Kind::Sim
            }
        });
        let (provider, model) = match kind {
            Kind::Sim => (self.simulated()?, "sim-1"),
            Kind::Openai => (openai()?, "gpt-4.1-mini"),
            Kind::Anthropic => (anthropic()?, "claude-haiku-4-5"),
        };
        Ok(Chosen {
            provider,
            model: self.model.clone().unwrap_or_else(|| model.to_owned()),
            simulated: kind == Kind::Sim,
        })
    }

    fn simulated(&self) -> Result<Box<dyn Provider>, Error> {
        if !(0.0..=1.0).contains(&self.sim_errors) {
            let message = format!("--sim-errors must be from 0 to 1, not {}", self.sim_errors);
            return Err(Error::new(ErrorKind::Config, message));
        }
        let mut sim = Sim::builder()
            .requests_per_minute(self.sim_rpm)
            .latency(Duration::from_millis(self.sim_latency))
            .jitter(0.5)
            .seed(self.sim_seed)
            .error_rate(self.sim_errors);
        if let Some(path) = &self.ledger {
            sim = sim.ledger_file(path);
        }
        Ok(Box::new(sim.build()))
    }
}

#[cfg(feature = "openai")]
fn openai() -> Result<Box<dyn Provider>, Error> {
    Ok(Box::new(throughline::OpenAi::from_env()?))
}

#[cfg(feature = "anthropic")]
fn anthropic() -> Result<Box<dyn Provider>, Error> {
    Ok(Box::new(throughline::Anthropic::from_env()?))
}

#[cfg(not(feature = "openai"))]
fn openai() -> Result<Box<dyn Provider>, Error> {
    Err(not_included("openai"))
}

#[cfg(not(feature = "anthropic"))]
fn anthropic() -> Result<Box<dyn Provider>, Error> {
    Err(not_included("anthropic"))
}

#[cfg(not(all(feature = "openai", feature = "anthropic")))]
fn not_included(feature: &str) -> Error {
    let message = format!(
        "this build does not include {feature}: add `--features full`, or use `--provider sim`"
    );
    Error::new(ErrorKind::Config, message)
}

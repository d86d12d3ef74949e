//! Continues a prompt.
#![allow(clippy::print_stdout, reason = "a command line program")]

use std::{
    io::{self, Write},
    num::NonZeroUsize,
    path::PathBuf,
    process::ExitCode,
    time::Instant,
};

use clap::Parser;
use gptq_examples::{
    device::{DeviceArgs, Job, KvArgs, Machine},
    failure::{Failure, run},
    text::TextCodec,
};
use gptq_kernels::{Backend, Workload};
use gptq_llama::{GenerateOptions, Generator, Llama, LoadOptions, Sampling};

/// Continues a prompt, token by token, on stdout; speed goes to stderr.
#[derive(Parser)]
#[command(version)]
struct Args {
    /// Model folder: config.json, safetensors, tokenizer.json
    #[arg(long, value_name = "DIR")]
    model: PathBuf,
    /// Text to continue
    #[arg(long, value_name = "TEXT")]
    prompt: String,
    /// Tokens to generate at most
    #[arg(long, default_value_t = 128, value_name = "N")]
    max_new_tokens: usize,
    /// 0 takes the likeliest token each time; 1 draws as the model says; above 1 is wilder
    #[arg(long, default_value_t = 0.0, value_name = "T")]
    temperature: f32,
    /// Draw from the N likeliest tokens
    #[arg(long, value_name = "N")]
    top_k: Option<NonZeroUsize>,
    /// Draw from the fewest tokens whose probability reaches P
    #[arg(long, default_value_t = 1.0, value_name = "P")]
    top_p: f32,
    /// Draw from tokens at least P times as likely as the likeliest
    #[arg(long, default_value_t = 0.0, value_name = "P")]
    min_p: f32,
    /// Above 1 against repetition
    #[arg(long, default_value_t = 1.0, value_name = "R")]
    repetition_penalty: f32,
    /// Seed of the draws: the same seed gives the same text
    #[arg(long, default_value_t = 0, value_name = "N")]
    seed: u64,
    /// Kernel of quantised layers, by name [default: chosen by cost and capability]
    #[arg(long, value_name = "NAME")]
    kernel: Option<String>,
    #[command(flatten)]
    kv: KvArgs,
    #[command(flatten)]
    device: DeviceArgs,
}

fn main() -> ExitCode {
    run(|args: Args| args.device.run(&args))
}

impl Job for Args {
    fn run<D: Backend>(&self, device: D, _: &Machine) -> Result<(), Failure> {
        write_text(self, device)
    }
}

#[allow(clippy::print_stderr, reason = "speed is for the reader, not for the text")]
fn write_text<D: Backend>(args: &Args, device: D) -> Result<(), Failure> {
    let codec = TextCodec::open(&args.model)?;
    let prompt = codec.encode(&args.prompt)?;
    let load = LoadOptions::default()
        .with_kernel(args.kernel.clone())
        .with_workload(Workload::generation(prompt.len(), args.max_new_tokens))
        .with_kv(args.kv.into());
    let model = Llama::load(&args.model, device, &load)?;
    let options = GenerateOptions {
        max_new_tokens: args.max_new_tokens,
        sampling: Sampling {
            temperature: args.temperature,
            top_k: args.top_k,
            top_p: args.top_p,
            min_p: args.min_p,
            repetition_penalty: args.repetition_penalty,
        },
        stop_tokens: model.config().eos_token_ids.clone(),
        seed: args.seed,
    };
    let mut generator = Generator::new(&model, &prompt, options)?;
    let start = Instant::now();
    generator.prefill()?;
    let prefill = start.elapsed();
    let mut out = io::stdout().lock();
    write!(out, "{}", args.prompt)?;
    let mut shown = String::new();
    while generator.next().transpose()?.is_some() {
        write!(out, "{}", codec.stream(generator.text(), &mut shown)?)?;
        out.flush()?;
    }
    writeln!(out)?;
    let decode = start.elapsed() - prefill;
    let new = generator.text().len();
    eprintln!(
        "[{} prompt tokens in {:.2} s, {new} tokens in {:.2} s: {:.1} tokens/s]",
        prompt.len(),
        prefill.as_secs_f64(),
        decode.as_secs_f64(),
        new as f64 / decode.as_secs_f64().max(1e-9)
    );
    Ok(())
}

//! Talks to a model.
#![allow(clippy::print_stdout, clippy::print_stderr, reason = "a command line program")]

use std::{
    io::{self, BufRead, IsTerminal, Write},
    num::NonZeroUsize,
    ops::ControlFlow,
    path::PathBuf,
    process::ExitCode,
    sync::{
        Arc,
        atomic::{AtomicBool, Ordering},
    },
    time::Instant,
};

use clap::Parser;
use gptq_examples::{
    chat_template::ChatFormat,
    conversation::{Conversation, Ended, ReplyOptions},
    device::{DeviceArgs, Job, KvArgs, Machine},
    failure::{Failure, run},
    text::TextCodec,
};
use gptq_kernels::Backend;
use gptq_llama::{Llama, LlamaError, LoadOptions, Sampling};

/// Replies to each line of standard input, on standard output.
///
/// The model folder needs a tokenizer_config.json with the chat template of Llama 2 or Llama 3. Earlier turns stay in the
/// cache. Ctrl-C ends a reply, or the program where none is being written. /clear forgets the conversation, /exit ends.
#[derive(Parser)]
#[command(version)]
struct Args {
    /// Model folder: config.json, safetensors, tokenizer.json, tokenizer_config.json
    #[arg(long, value_name = "DIR")]
    model: PathBuf,
    /// What the model is told before the conversation
    #[arg(long, value_name = "TEXT")]
    system: Option<String>,
    /// Tokens of a reply at most
    #[arg(long, default_value_t = 512, value_name = "N")]
    max_new_tokens: usize,
    /// Tokens of a conversation at most [default: what the model was trained for, at most 8192]
    #[arg(long, value_name = "N")]
    context: Option<usize>,
    /// 0 takes the likeliest token each time; 1 draws as the model says; above 1 is wilder
    #[arg(long, default_value_t = 0.7, value_name = "T")]
    temperature: f32,
    /// Draw from the N likeliest tokens
    #[arg(long, value_name = "N")]
    top_k: Option<NonZeroUsize>,
    /// Draw from the fewest tokens whose probability reaches P
    #[arg(long, default_value_t = 0.9, value_name = "P")]
    top_p: f32,
    /// Seed of the draws: the same seed and turns give the same replies
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

/// What Ctrl-C means.
#[derive(Default)]
struct Interrupt {
    replying: AtomicBool,
    stop: AtomicBool,
}

impl Interrupt {
    fn listen() -> Result<Arc<Self>, Failure> {
        let interrupt = Arc::new(Self::default());
        let heard = Arc::clone(&interrupt);
        ctrlc::set_handler(move || {
            // Twice in one reply ends the program too.
            if !heard.replying.load(Ordering::SeqCst) || heard.stop.swap(true, Ordering::SeqCst) {
                std::process::exit(130);
            }
        })?;
        Ok(interrupt)
    }

    fn begin(&self) {
        self.stop.store(false, Ordering::SeqCst);
        self.replying.store(true, Ordering::SeqCst);
    }

    fn end(&self) {
        self.replying.store(false, Ordering::SeqCst);
    }
}

impl Job for Args {
    fn run<D: Backend>(&self, device: D, _: &Machine) -> Result<(), Failure> {
        talk(self, device)
    }
}

fn talk<D: Backend>(args: &Args, device: D) -> Result<(), Failure> {
    let format = ChatFormat::read(&args.model)?;
    let codec = TextCodec::open(&args.model)?;
    let options = LoadOptions::default().with_kernel(args.kernel.clone()).with_kv(args.kv.into());
    let model = Llama::load(&args.model, device, &options)?;
    let mut stop_tokens = model.config().eos_token_ids.clone();
    stop_tokens.extend(format.ends().into_iter().filter_map(|end| codec.special(end)));
    let sampling = Sampling {
        temperature: args.temperature,
        top_k: args.top_k,
        top_p: args.top_p,
        ..Sampling::default()
    };
    let context = args.context.unwrap_or_else(|| model.config().max_positions.min(8192));
    let max_new_tokens = args.max_new_tokens;
    let options = ReplyOptions { max_new_tokens, sampling, stop_tokens, seed: args.seed };
    let mut conversation = Conversation::new(&model, context, options)?;
    let interrupt = Interrupt::listen()?;
    let (mut lines, terminal) = (io::stdin().lock().lines(), io::stdin().is_terminal());
    loop {
        if terminal {
            eprint!("> ");
        }
        let Some(line) = lines.next().transpose()? else { break };
        match line.trim() {
            "" => continue,
            "/exit" => break,
            "/clear" => {
                conversation.clear()?;
                continue;
            }
            user => {
                let turn = if conversation.tokens().is_empty() {
                    format.first_turn(args.system.as_deref(), user)
                } else {
                    format.next_turn(user)
                };
                reply(&mut conversation, &codec, &codec.encode_as_is(&turn)?, &interrupt)?;
            }
        }
    }
    Ok(())
}

/// Writes a reply while it comes, and what it took to standard error.
fn reply<D: Backend>(
    conversation: &mut Conversation<'_, D>,
    codec: &TextCodec,
    turn: &[u32],
    interrupt: &Interrupt,
) -> Result<(), Failure> {
    let (mut out, mut shown, mut count) = (io::stdout().lock(), String::new(), 0);
    let start = Instant::now();
    let mut first = start;
    interrupt.begin();
    let ended = conversation.reply::<Failure>(turn, |reply| {
        if count == 0 {
            first = Instant::now();
        }
        count = reply.len();
        write!(out, "{}", codec.stream(reply, &mut shown)?)?;
        out.flush()?;
        Ok(if interrupt.stop.load(Ordering::SeqCst) {
            ControlFlow::Break(())
        } else {
            ControlFlow::Continue(())
        })
    });
    interrupt.end();
    writeln!(out)?;
    let note = match ended {
        Ok(Ended::Stop) => "",
        Ok(Ended::Length) => ", cut off",
        Ok(Ended::Cancelled) => ", broken off",
        Ok(Ended::Full) => ", and the context is full: /clear begins anew",
        Err(error) => match error.downcast_ref::<LlamaError>() {
            Some(LlamaError::ContextLength { .. }) => {
                eprintln!("[{error}: /clear begins anew]");
                return Ok(());
            }
            _ => return Err(error),
        },
    };
    let speed = count.saturating_sub(1) as f64 / first.elapsed().as_secs_f64().max(1e-9);
    eprintln!(
        "[{} tokens read, first token after {:.2} s, {count} tokens, {speed:.1} tokens/s{note}]",
        turn.len(),
        (first - start).as_secs_f64()
    );
    Ok(())
}

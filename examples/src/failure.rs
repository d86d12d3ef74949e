//! Errors as a user should see them: one line on stderr, exit code 1.

use std::{error::Error, process::ExitCode};

use clap::Parser;

/// Whatever went wrong.
pub type Failure = Box<dyn Error + Send + Sync>;

/// Parses the command line as `A` and runs `body` on it.
///
/// `--help` and `--version` print and succeed. Any error, of the command line too, becomes one line on stderr and exit
/// code 1.
pub fn run<A: Parser>(body: impl FnOnce(A) -> Result<(), Failure>) -> ExitCode {
    let args = match A::try_parse() {
        Ok(args) => args,
        Err(error) if !error.use_stderr() => {
            // Nobody listens if this fails.
            let _ = error.print();
            return ExitCode::SUCCESS;
        }
        Err(error) => {
            let text = error.to_string();
            let line = text.lines().take_while(|line| !line.is_empty()).collect::<Vec<_>>().join(" ");
            return fail(line.trim_start_matches("error: "));
        }
    };
    let filter = tracing_subscriber::fmt().with_writer(std::io::stderr).with_max_level(tracing::Level::WARN);
    // Another subscriber can only be there if a caller has set one, which is as good.
    let _ = filter.try_init();
    match body(args) {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => fail(&error.to_string()),
    }
}

#[allow(clippy::print_stderr, reason = "this is where errors end")]
fn fail(message: &str) -> ExitCode {
    eprintln!("error: {}", one_line(message));
    ExitCode::FAILURE
}

fn one_line(message: &str) -> String {
    message.split(['\n', '\r']).map(str::trim).filter(|part| !part.is_empty()).collect::<Vec<_>>().join(" ")
}

#[cfg(test)]
mod tests {
    #[test]
    fn messages_become_one_line() {
        assert_eq!(super::one_line("a\n  b\r\n\nc"), "a b c");
    }
}

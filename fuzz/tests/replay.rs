//! Every input of the corpus, through the function that fuzzing calls: a panic is a failure. Needs no libFuzzer.

use std::fs;
use std::path::Path;

#[test]
fn corpus() {
    let corpus = Path::new(env!("CARGO_MANIFEST_DIR")).join("corpus");
    for (target, run) in gptq_fuzz::TARGETS {
        let mut inputs: Vec<_> = fs::read_dir(corpus.join(target))
            .unwrap_or_else(|error| panic!("{target} has no corpus: {error}"))
            .map(|entry| entry.expect("an entry").path())
            .collect();
        inputs.sort();
        assert!(inputs.len() > 10, "{target}: {} inputs", inputs.len());
        for input in &inputs {
            let data = fs::read(input).expect("reads");
            if std::panic::catch_unwind(|| run(&data)).is_err() {
                panic!("{target} fails on {}", input.display());
            }
        }
        println!("{target}: {} inputs", inputs.len());
    }
}

#![no_main]

libfuzzer_sys::fuzz_target!(|data: &[u8]| gptq_fuzz::quantize_config(data));

#![no_main]

libfuzzer_sys::fuzz_target!(|data: &[u8]| gptq_fuzz::tensor_file(data));

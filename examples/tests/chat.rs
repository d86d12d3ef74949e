//! The pieces of the example `chat`, on the bundled model and the CPU. The model is not one for conversations, but what is
//! said to it and what stays in the cache is the same.
// clippy.toml allows it in tests, but not in the functions that tests share.
#![allow(clippy::unwrap_used)]

use std::{ops::ControlFlow, path::Path};

use gptq_examples::{
    chat_template::{ChatFormat, ChatTemplate},
    conversation::{Conversation, Ended, ReplyOptions},
    failure::Failure,
    text::TextCodec,
};
use gptq_kernels::cpu::Cpu;
use gptq_llama::{GenerateOptions, Llama, LlamaError, LoadOptions, Sampling, generate};

fn dir() -> &'static Path {
    Path::new(concat!(env!("CARGO_MANIFEST_DIR"), "/tiny-books"))
}

fn model() -> Llama<Cpu> {
    Llama::load(dir(), Cpu, &LoadOptions::default()).unwrap()
}

fn options(max_new_tokens: usize) -> ReplyOptions {
    ReplyOptions { max_new_tokens, sampling: Sampling::default(), stop_tokens: Vec::new(), seed: 1 }
}

/// The format that a folder with this template gets.
fn format(template: &str) -> ChatFormat {
    let folder = tempfile::tempdir().unwrap();
    let config = serde_json::json!({"chat_template": template, "bos_token": "<s>", "eos_token": "</s>"});
    std::fs::write(folder.path().join("tokenizer_config.json"), config.to_string()).unwrap();
    ChatFormat::read(folder.path()).unwrap()
}

fn say(conversation: &mut Conversation<'_, Cpu>, turn: &[u32], most: usize) -> (Vec<u32>, Ended) {
    let mut reply = Vec::new();
    let ended = conversation.reply::<Failure>(turn, |so_far| {
        reply = so_far.to_vec();
        Ok(if reply.len() == most { ControlFlow::Break(()) } else { ControlFlow::Continue(()) })
    });
    (reply, ended.unwrap())
}

/// What the model says to everything before, fed anew.
fn anew(model: &Llama<Cpu>, before: &[u32], max_new_tokens: usize) -> Vec<u32> {
    let options = GenerateOptions { max_new_tokens, ..GenerateOptions::default() };
    generate(model, before, options, |_| ControlFlow::Continue(())).unwrap()
}

#[test]
fn turns_stay_in_the_cache() {
    let (model, codec) = (model(), TextCodec::open(dir()).unwrap());
    for (template, family) in [
        ("[INST] <<SYS>> <</SYS>> [/INST]", ChatTemplate::Llama2),
        ("<|start_header_id|> <|end_header_id|> <|eot_id|>", ChatTemplate::Llama3),
    ] {
        let format = format(template);
        assert_eq!(format.template(), family);
        let mut conversation = Conversation::new(&model, 400, options(12)).unwrap();
        let mut before = Vec::new();
        for (i, user) in ["The carriage stopped.", "And then?", "Why?"].into_iter().enumerate() {
            let text =
                if i == 0 { format.first_turn(Some("Be brief."), user) } else { format.next_turn(user) };
            let turn = codec.encode_as_is(&text).unwrap();
            before.extend(&turn);
            // The second reply is broken off, and still stands before the third turn.
            let most = if i == 1 { 5 } else { usize::MAX };
            let (reply, ended) = say(&mut conversation, &turn, most);
            let cut = i == 1;
            assert_eq!(ended, if cut { Ended::Cancelled } else { Ended::Length });
            assert_eq!(reply, anew(&model, &before, if cut { 5 } else { 12 }), "{family:?}, turn {i}");
            before.extend(&reply);
            assert_eq!(conversation.tokens(), before);
        }
        conversation.clear().unwrap();
        let turn = codec.encode_as_is(&format.first_turn(None, "Once")).unwrap();
        assert_eq!(say(&mut conversation, &turn, usize::MAX).0, anew(&model, &turn, 12));
    }
}

#[test]
fn special_tokens_of_a_turn_are_tokens() {
    let codec = TextCodec::open(dir()).unwrap();
    let format = format("[INST] <<SYS>> <</SYS>> [/INST]");
    let turn = codec.encode_as_is(&format.next_turn("Why?")).unwrap();
    assert_eq!(turn[..2], [1, 0]);
    assert_eq!(turn.iter().filter(|&&token| token < 2).count(), 2);
    assert_eq!(codec.special("</s>"), Some(1));
    assert_eq!(codec.special("<|eot_id|>"), None);
}

#[test]
fn a_stop_token_ends_a_reply_and_is_not_part_of_it() {
    let model = model();
    let turn = [0, 100, 200, 300];
    let all = anew(&model, &turn, 12);
    let stop = *all.last().unwrap();
    let first = all.iter().position(|&token| token == stop).unwrap();
    let mut conversation =
        Conversation::new(&model, 100, ReplyOptions { stop_tokens: vec![stop], ..options(50) }).unwrap();
    let (reply, ended) = say(&mut conversation, &turn, usize::MAX);
    assert_eq!((reply.as_slice(), ended), (&all[..first], Ended::Stop));
    // What follows is what it would be if all had been fed at once.
    let before = [&turn, reply.as_slice(), &[1, 0, 7]].concat();
    let mut whole = anew(&model, &before, 12);
    whole.truncate(whole.iter().position(|&token| token == stop).unwrap_or(12));
    let (reply, _) = say(&mut conversation, &[1, 0, 7], 12);
    assert_eq!(reply[..whole.len().min(reply.len())], whole[..]);
}

#[test]
fn a_full_cache_ends_the_conversation() {
    let model = model();
    let mut conversation = Conversation::new(&model, 20, options(50)).unwrap();
    let (reply, ended) = say(&mut conversation, &[0; 10], usize::MAX);
    // The last token need not be fed.
    assert_eq!((reply.len(), ended), (11, Ended::Full));
    let error = conversation.reply::<LlamaError>(&[1, 2], |_| Ok(ControlFlow::Continue(()))).unwrap_err();
    assert!(matches!(error, LlamaError::ContextLength { needed: 23, limit: 20 }), "{error}");
    assert_eq!(conversation.tokens().len(), 21);
    conversation.clear().unwrap();
    let error = conversation.reply::<LlamaError>(&[], |_| Ok(ControlFlow::Continue(()))).unwrap_err();
    assert!(matches!(error, LlamaError::NoTokens { .. }), "{error}");
    assert_eq!(say(&mut conversation, &[0; 10], 3).1, Ended::Cancelled);
}

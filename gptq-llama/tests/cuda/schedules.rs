//! Sequences that join and leave a batch.

use super::*;

/// A sequence of a schedule: what is still to be fed, and what it gives when it is alone.
struct Member {
    id: SequenceId,
    tokens: Vec<u32>,
    fed: usize,
    prompt: usize,
    want: Array2<f32>,
}

/// Sequences join and leave, prompts come in parts and single tokens one by one, several at a time; every logit has the
/// bits that the sequence gives alone.
pub(super) fn schedule<T: Element>(
    model: &Llama<CudaDevice<T>>,
    cache: &mut KvCache<CudaDevice<T>>,
    seed: u64,
) {
    let mut rng = Rng::new(seed);
    let mut below = |n: usize| (rng.next_u64() % n as u64) as usize;
    let mut waiting: VecDeque<(usize, usize)> = (0..2 + below(5))
        .map(|_| {
            let longest = if below(6) == 0 { 500 } else { 60 };
            (1 + below(longest), 1 + below(20))
        })
        .collect();
    let mut text = Rng::new(seed ^ 77);
    let mut members: Vec<Member> = Vec::new();
    while !(waiting.is_empty() && members.is_empty()) {
        if members.is_empty() || (!waiting.is_empty() && below(3) == 0) {
            let (prompt, new) = waiting.pop_front().unwrap();
            let tokens = tokens(&mut text, prompt + new);
            let want = logits(model, &tokens);
            members.push(Member { id: cache.add(), tokens, fed: 0, prompt, want });
        }
        // Everybody or some, in any order.
        let some = below(4) == 0;
        let mut order: Vec<usize> = (0..members.len()).filter(|_| !some || below(2) == 0).collect();
        for i in (1..order.len()).rev() {
            order.swap(i, below(i + 1));
        }
        let ends: Vec<usize> = order
            .iter()
            .map(|&i| {
                let member = &members[i];
                let left = member.prompt.saturating_sub(member.fed);
                member.fed + if left > 0 { 1 + below(left) } else { 1 }
            })
            .collect();
        if order.is_empty() {
            continue;
        }
        let feeds: Vec<Feed<'_>> = order
            .iter()
            .zip(&ends)
            .map(|(&i, &end)| {
                let member = &members[i];
                Feed { sequence: member.id, tokens: &member.tokens[member.fed..end], logits: Wanted::Last }
            })
            .collect();
        let got = model.forward(cache, &feeds).unwrap().to_array().unwrap();
        for ((&i, &end), got) in order.iter().zip(&ends).zip(got.rows()) {
            assert_eq!(
                got,
                members[i].want.row(end - 1),
                "seed {seed}, token {end} of {}",
                members[i].tokens.len()
            );
            members[i].fed = end;
        }
        members.retain(|member| {
            let done = member.fed == member.tokens.len();
            if done {
                cache.remove(member.id).unwrap();
            }
            !done
        });
    }
}

fn schedules<T: Element>(count: u64, kv: KvFormat) {
    let Some(device) = gpu::<T>() else { return };
    for extra in ["", WINDOW] {
        let model = load_model(&device, random_model(3, extra, false), kv);
        let mut cache = model.cache(700).unwrap();
        for seed in 0..count / 2 {
            schedule(&model, &mut cache, seed);
        }
    }
    println!("{} {kv:?}: {count} schedules", T::NAME);
}

#[test]
fn batches_change_no_bit_in_fp16() {
    schedules::<f16>(1000, KvFormat::Activations);
}

#[test]
fn batches_change_no_bit_in_bf16() {
    schedules::<bf16>(100, KvFormat::Activations);
}

#[test]
fn batches_change_no_bit_of_what_is_kept_in_bytes() {
    schedules::<f16>(60, KvFormat::Int8);
    schedules::<bf16>(20, KvFormat::Int8);
}

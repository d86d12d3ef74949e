//! Steps that are begun before the tokens of the one before are known.

use gptq_kernels::{Draw, KernelError, cuda::CudaDevice};
use gptq_llama::{
    Drawing, Feed, GenerateOptions, Generator, KvCache, Llama, LlamaError, Next, Rng, Sampling, SequenceId,
    Turn, Wanted, generate,
};
use half::f16;

use super::{gpu, load, tokens};

type Model = Llama<CudaDevice<f16>>;

/// The tokens of one sequence alone: logits to the host, one draw after the other.
fn alone(model: &Model, prompt: &[u32], draws: &[Draw]) -> Vec<u32> {
    let mut cache = model.cache(700).unwrap();
    let sequence = cache.add();
    let (mut next, mut drawn) = (prompt.to_vec(), Vec::new());
    for draw in draws {
        let feed = Feed { sequence, tokens: &next, logits: Wanted::Last };
        let logits = model.forward(&mut cache, &[feed]).unwrap().to_array().unwrap();
        let token = draw.token(logits.as_slice().unwrap()).unwrap();
        drawn.push(token);
        next = vec![token];
    }
    drawn
}

struct Member {
    /// Tells it from those that left and whose place in the cache it has taken.
    number: u64,
    id: SequenceId,
    prompt: Vec<u32>,
    draws: Vec<Draw>,
    want: Vec<u32>,
    begun: usize,
    got: Vec<u32>,
}

/// A step whose tokens are not known yet, and the numbers of those who take part.
type Begun = (Drawing, Vec<u64>);

fn read(
    model: &Model,
    cache: &mut KvCache<CudaDevice<f16>>,
    members: &mut [Member],
    (drawing, numbers): Begun,
) {
    for (token, number) in model.drawn(cache, drawing).unwrap().into_iter().zip(numbers) {
        // Those that have left have done a step too much.
        if let Some(member) =
            members.iter_mut().find(|member| member.number == number && member.got.len() < member.want.len())
        {
            member.got.push(token.unwrap());
            assert_eq!(member.got[..], member.want[..member.got.len()], "prompt of {}", member.prompt.len());
        }
    }
}

#[test]
fn steps_begun_ahead_give_the_same_tokens() {
    let Some(device) = gpu::<f16>() else { return };
    let model = load(&device, 12, "");
    let mut rng = Rng::new(20);
    let mut cache = model.cache(700).unwrap();
    let mut members: Vec<Member> = Vec::new();
    let mut begun: Option<Begun> = None;
    let (mut joined, mut rounds) = (0, 0);
    while joined < 12 || !members.is_empty() {
        rounds += 1;
        let mut below = |n: u64| rng.next_u64() % n;
        if joined < 12 && (members.is_empty() || below(9) == 0) {
            let (greedy, len) =
                (below(2) == 0, if joined % 3 == 0 { 250 + below(20) } else { 1 + below(70) });
            let prompt = tokens(&mut Rng::new(joined), len as usize);
            let draws: Vec<Draw> = (0..5 + below(80))
                .map(|_| match greedy {
                    true => Draw::GREEDY,
                    false => {
                        Draw { temperature: 0.8, top_k: 40, top_p: 0.9, min_p: 0.01, random: below(u64::MAX) }
                    }
                })
                .collect();
            let want = alone(&model, &prompt, &draws);
            members.push(Member {
                number: joined,
                id: cache.add(),
                prompt,
                draws,
                want,
                begun: 0,
                got: Vec::new(),
            });
            joined += 1;
        }
        // Now and then the tokens are known before the next step.
        let known = below(8) == 0;
        if known && let Some(begun) = begun.take() {
            read(&model, &mut cache, &mut members, begun);
        }
        let turns: Vec<Turn<'_>> = members
            .iter()
            .map(|member| Turn {
                sequence: member.id,
                next: match (member.begun, member.got.as_slice()) {
                    (0, _) => Next::Tokens(&member.prompt),
                    (begun, got) if known && got.len() == begun => Next::Tokens(&got[begun - 1..]),
                    _ => Next::Drawn,
                },
                draw: *member.draws.get(member.begun).unwrap_or(&Draw::GREEDY),
            })
            .collect();
        let drawing = model.step(&mut cache, &turns).unwrap();
        let now = (drawing, members.iter().map(|member| member.number).collect());
        members.iter_mut().for_each(|member| member.begun += 1);
        if let Some(before) = begun.replace(now) {
            read(&model, &mut cache, &mut members, before);
        }
        members.retain(|member| {
            let done = member.got.len() == member.want.len();
            if done {
                cache.remove(member.id).unwrap();
            }
            !done
        });
    }
    println!("{rounds} steps");
}

#[test]
fn generators_draw_what_the_host_would() {
    let Some(device) = gpu::<f16>() else { return };
    let model = load(&device, 13, "");
    let prompt = tokens(&mut Rng::new(1), 50);
    let sampling = Sampling { temperature: 0.9, top_p: 0.95, ..Sampling::default() };
    for (sampling, seed) in
        [(Sampling::default(), 0), (sampling.clone(), 1), (Sampling { min_p: 0.02, ..sampling }, 2)]
    {
        let options = GenerateOptions { max_new_tokens: 100, sampling, seed, ..GenerateOptions::default() };
        let text: Vec<u32> =
            Generator::new(&model, &prompt, options.clone()).unwrap().map(Result::unwrap).collect();
        let (mut rng, mut cache) = (Rng::new(seed), model.cache(700).unwrap());
        let sequence = cache.add();
        let (mut history, mut fed) = (prompt.clone(), 0);
        for &token in &text {
            let feed = Feed { sequence, tokens: &history[fed..], logits: Wanted::Last };
            let mut logits = model.forward(&mut cache, &[feed]).unwrap().to_array().unwrap();
            fed = history.len();
            let want = options.sampling.draw(logits.as_slice_mut().unwrap(), &history, &mut rng).unwrap();
            assert_eq!(token, want, "token {}", history.len());
            history.push(token);
        }

        // A text that ends early is the beginning of the other, and changes nothing for what comes next.
        let first = |token: &u32| text.iter().position(|other| other == token) == Some(40);
        let stop = text[40..].iter().copied().find(|token| first(token));
        if let Some(stop) = stop {
            let early = GenerateOptions { stop_tokens: vec![stop], ..options.clone() };
            assert_eq!(
                generate(&model, &prompt, early, |_| std::ops::ControlFlow::Continue(())).unwrap(),
                text[..40]
            );
        }
        assert_eq!(
            generate(&model, &prompt, options, |_| std::ops::ControlFlow::Continue(())).unwrap(),
            text
        );
    }
}

#[test]
fn what_was_not_drawn_is_not_fed() {
    let Some(device) = gpu::<f16>() else { return };
    let model = load(&device, 14, "");
    let mut cache = model.cache(100).unwrap();
    let (a, b) = (cache.add(), cache.add());
    let turn = |sequence, next| Turn { sequence, next, draw: Draw::GREEDY };
    let nothing = |result| assert!(matches!(result, Err(LlamaError::NothingDrawn { .. })), "{result:?}");
    nothing(model.step(&mut cache, &[turn(a, Next::Drawn)]));
    let first = model.step(&mut cache, &[turn(a, Next::Tokens(&[1, 2]))]).unwrap();
    nothing(model.step(&mut cache, &[turn(a, Next::Drawn), turn(b, Next::Drawn)]));
    assert_eq!(cache.len(a).unwrap(), 2);
    model.step(&mut cache, &[turn(b, Next::Tokens(&[3])), turn(a, Next::Drawn)]).unwrap();
    cache.truncate(a, 2).unwrap();
    nothing(model.step(&mut cache, &[turn(a, Next::Drawn)]));
    let again = model.step(&mut cache, &[turn(b, Next::Drawn)]).unwrap();
    assert_eq!(model.drawn(&mut cache, again).unwrap().len(), 1);
    let old = model.drawn(&mut cache, first).unwrap_err();
    assert!(matches!(old, LlamaError::Kernel(KernelError::Argument { what: "drawing", .. })), "{old}");
}

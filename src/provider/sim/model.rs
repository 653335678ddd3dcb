//! The simulated model: the answer, the latency and the fault of a call.
//!
//! The answer is drawn from the seed, the item key and the digest, so an item that sends a request
//! again gets the same answer. Jitter and faults are drawn from these and the number of times that
//! the call was admitted before, so a retry draws anew. Nothing depends on the order in
//! which calls arrive: a run with another parallelism gets the same answers and faults.

use std::fmt;
use std::ops::RangeInclusive;
use std::sync::Arc;
use std::time::Duration;

use fastrand::Rng;

use crate::error::ErrorKind;
use crate::request::{FinishReason, Request, RequestDigest};

/// A distribution of the tokens of answers.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Tokens(Shape);

#[derive(Debug, Clone, Copy, PartialEq)]
enum Shape {
    Uniform { least: u64, most: u64 },
    HeavyTailed { median: f64, sigma: f64 },
}

impl Tokens {
    /// Returns a distribution with the one value `n`.
    pub const fn fixed(n: u64) -> Self {
        Self(Shape::Uniform { least: n, most: n })
    }

    /// Returns the uniform distribution over a range.
    ///
    /// # Panics
    /// If the range is empty.
    pub fn uniform(range: RangeInclusive<u64>) -> Self {
        let (least, most) = range.into_inner();
        assert!(least <= most, "the range {least}..={most} is empty");
        Self(Shape::Uniform { least, most })
    }

    /// Returns a log-normal distribution, which real answer lengths resemble: half of them are
    /// below `median`, one in a hundred is above `p99`, and a few are far above. At least 1.
    ///
    /// # Panics
    /// If `median` is zero, or `p99` below it.
    pub fn heavy_tailed(median: u64, p99: u64) -> Self {
        assert!(0 < median && median <= p99, "0 < median <= p99 must hold");
        let (median, p99) = (median as f64, p99 as f64);
        // 99 % of a normal distribution lie below 2.326 standard deviations.
        let sigma = (p99 / median).ln() / 2.326_347_874;
        Self(Shape::HeavyTailed { median, sigma })
    }

    fn draw(self, rng: &mut Rng) -> u64 {
        match self.0 {
            Shape::Uniform { least, most } => rng.u64(least..=most),
            Shape::HeavyTailed { median, sigma } => {
                // Box and Muller; 1 - u is never 0, whose logarithm is not finite.
                let radius = (-2.0 * (1.0 - rng.f64()).ln()).sqrt();
                let normal = radius * (std::f64::consts::TAU * rng.f64()).cos();
                (median * (sigma * normal).exp()).round().max(1.0) as u64
            }
        }
    }
}

/// A fault of an admitted call.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Fault {
    /// 500.
    Error,
    /// The connection is reset.
    Reset,
    /// No answer, ever.
    Hang,
    /// The answer ends in the middle.
    Cut,
    /// 503.
    Overload,
    /// 429.
    Throttle,
}

/// The probability of each fault.
#[derive(Debug, Clone, Copy, Default)]
pub(super) struct FaultRates(pub(super) [f64; 6]);

impl FaultRates {
    const ORDER: [Fault; 6] = [
        Fault::Error,
        Fault::Reset,
        Fault::Hang,
        Fault::Cut,
        Fault::Overload,
        Fault::Throttle,
    ];

    pub(super) fn set(&mut self, fault: Fault, rate: f64) {
        let index = Self::ORDER.iter().position(|f| *f == fault);
        self.0[index.unwrap_or(0)] = rate;
        let sum: f64 = self.0.iter().sum();
        assert!(
            self.0.iter().all(|rate| (0.0..=1.0).contains(rate)) && sum <= 1.0 + 1e-9,
            "fault rates lie in 0.0..=1.0, and so does their sum: {sum}"
        );
    }

    fn draw(&self, rng: &mut Rng) -> Option<Fault> {
        let mut point = rng.f64();
        for (fault, rate) in Self::ORDER.into_iter().zip(self.0) {
            if point < rate {
                return Some(fault);
            }
            point -= rate;
        }
        None
    }
}

pub(super) type ReplyFn = Arc<dyn Fn(&Request) -> String + Send + Sync>;

/// Values for the calls whose last message contains certain words.
#[derive(Clone)]
pub(super) struct ByPrompt<T>(Vec<(String, T)>);

impl<T> Default for ByPrompt<T> {
    fn default() -> Self {
        Self(Vec::new())
    }
}

impl<T> ByPrompt<T> {
    pub(super) fn add(&mut self, words: String, value: T) {
        self.0.push((words, value));
    }

    /// Returns the last value that matches.
    fn find(&self, request: &Request) -> Option<&T> {
        let prompt = request.last_text();
        let matches = |(words, _): &&(String, T)| prompt.contains(words);
        self.0.iter().rev().find(matches).map(|(_, value)| value)
    }
}

#[derive(Clone, Default)]
pub(super) struct Model {
    pub(super) seed: u64,
    pub(super) latency: Duration,
    pub(super) latencies: ByPrompt<Duration>,
    pub(super) first_token: Duration,
    pub(super) per_token: Duration,
    pub(super) jitter: f64,
    pub(super) output: Option<Tokens>,
    pub(super) reply: Option<ReplyFn>,
    pub(super) replies: ByPrompt<ReplyFn>,
    pub(super) failures: ByPrompt<ErrorKind>,
    pub(super) faults: FaultRates,
}

impl fmt::Debug for Model {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Model")
            .field("seed", &self.seed)
            .field("latency", &self.latency)
            .field("first_token", &self.first_token)
            .field("per_token", &self.per_token)
            .field("jitter", &self.jitter)
            .field("output", &self.output)
            .field("faults", &self.faults)
            .finish_non_exhaustive()
    }
}

/// The course of one call, decided when it is admitted.
#[derive(Debug, Default)]
pub(super) struct Plan {
    pub(super) text: String,
    pub(super) output_tokens: u64,
    /// The answer was cut at `max_tokens`.
    pub(super) too_long: bool,
    /// From admission to the first token.
    pub(super) first_token: Duration,
    /// From admission to the end.
    pub(super) total: Duration,
    pub(super) fault: Option<Fault>,
    /// The error that the call ends with because of its prompt, not by chance.
    pub(super) failure: Option<ErrorKind>,
    /// The time of the fault, counted from admission.
    pub(super) fault_at: Duration,
}

impl Model {
    pub(super) fn plan(
        &self,
        request: &Request,
        key: &str,
        digest: &RequestDigest,
        admitted_before: u64,
    ) -> Plan {
        let rng = |nth: &[u8]| {
            let seed = self.seed.to_le_bytes();
            Rng::with_seed(fnv(&[&seed, key.as_bytes(), digest.as_bytes(), nth]))
        };
        let mut chance = rng(&admitted_before.to_le_bytes());
        let fault = self.faults.draw(&mut chance);
        let jitter = 1.0 + self.jitter * (2.0 * chance.f64() - 1.0);
        let fault_part = chance.f64();

        let (mut text, whole) = self.answer(request, rng(&[]));
        let output_tokens = whole.min(request.max_tokens.unwrap_or(u64::MAX));
        let too_long = output_tokens < whole;
        if too_long {
            // The text is cut in proportion to its tokens.
            let keep = text.chars().count() as u128 * u128::from(output_tokens);
            let keep = (keep / u128::from(whole)) as usize;
            text = text.chars().take(keep).collect();
        }

        let generation = self.per_token.as_nanos() as f64 * output_tokens as f64;
        let latency = self.latencies.find(request).unwrap_or(&self.latency);
        let total = self.first_token + *latency + Duration::from_nanos(generation as u64);
        let total = total.mul_f64(jitter);
        let first_token = self.first_token.mul_f64(jitter);
        let fault_at = match fault {
            // A cut comes after some text, other faults come before any.
            Some(Fault::Cut) => first_token + (total - first_token).mul_f64(fault_part),
            Some(Fault::Overload | Fault::Throttle) => Duration::ZERO,
            _ => total.mul_f64(fault_part),
        };
        Plan {
            text,
            output_tokens,
            too_long,
            first_token,
            total,
            fault,
            failure: self.failures.find(request).copied(),
            fault_at,
        }
    }

    /// Returns the whole answer and its tokens.
    fn answer(&self, request: &Request, mut rng: Rng) -> (String, u64) {
        let drawn = self.output.map(|tokens| tokens.draw(&mut rng));
        match self.replies.find(request).or(self.reply.as_ref()) {
            Some(reply) => {
                let text = reply(request);
                let counted = (text.len() as u64).div_ceil(4);
                (text, drawn.unwrap_or(counted))
            }
            None => {
                let tokens = drawn.unwrap_or_else(|| Tokens::uniform(8..=40).draw(&mut rng));
                (prose(tokens, &mut rng), tokens)
            }
        }
    }
}

impl Plan {
    pub(super) fn finish(&self) -> FinishReason {
        if self.too_long {
            FinishReason::Length
        } else {
            FinishReason::Stop
        }
    }

    /// Returns the tokens that have been generated `elapsed` after admission.
    pub(super) fn generated(&self, elapsed: Duration) -> u64 {
        if elapsed >= self.total {
            return self.output_tokens;
        }
        let generating = elapsed.saturating_sub(self.first_token).as_nanos();
        let whole = (self.total - self.first_token).as_nanos();
        (u128::from(self.output_tokens) * generating / whole.max(1)) as u64
    }

    /// Returns the text in at most 200 pieces of about a token, each with its time: the first
    /// at the first token, the last at the end, the others evenly between. Pieces may end within
    /// words.
    pub(super) fn pieces(&self) -> Vec<(Duration, String)> {
        let chars: Vec<char> = self.text.chars().collect();
        let count = (self.output_tokens.clamp(1, 200) as usize).min(chars.len());
        let span = self.total - self.first_token;
        (0..count)
            .map(|i| {
                let at = match count {
                    1 => self.total,
                    _ => self.first_token + span * i as u32 / (count as u32 - 1),
                };
                let piece = &chars[i * chars.len() / count..(i + 1) * chars.len() / count];
                (at, piece.iter().collect())
            })
            .collect()
    }
}

/// FNV-1a: a hash that stays the same on every machine and in every release.
fn fnv(parts: &[&[u8]]) -> u64 {
    let mut hash = 0xcbf2_9ce4_8422_2325_u64;
    for part in parts {
        // The length keeps ("ab", "c") and ("a", "bc") apart.
        for byte in (part.len() as u64).to_le_bytes().iter().chain(*part) {
            hash = (hash ^ u64::from(*byte)).wrapping_mul(0x100_0000_01b3);
        }
    }
    hash
}

const WORDS: [&str; 48] = [
    "river", "stone", "morning", "slow", "light", "garden", "voice", "silver", "the", "a", "of",
    "and", "under", "over", "between", "walks", "rests", "turns", "keeps", "carries", "bridge",
    "window", "quiet", "early", "long", "paper", "song", "harbour", "field", "cloud", "brings",
    "follows", "small", "bright", "road", "door", "letter", "winter", "before", "after", "again",
    "each", "other", "water", "measures", "answers", "north", "open",
];

/// Returns sentences with `words` words in all. A word counts as a token.
fn prose(words: u64, rng: &mut Rng) -> String {
    let mut text = String::new();
    let mut left_in_sentence = 0;
    for i in 0..words {
        let word = WORDS[rng.usize(..WORDS.len())];
        if left_in_sentence == 0 {
            left_in_sentence = rng.u64(6..=14).min(words - i);
            text.push_str(if i == 0 { "" } else { " " });
            text.push(word.as_bytes()[0].to_ascii_uppercase() as char);
            text.push_str(&word[1..]);
        } else {
            text.push(' ');
            text.push_str(word);
        }
        left_in_sentence -= 1;
        if left_in_sentence == 0 {
            text.push('.');
        }
    }
    text
}

#[cfg(test)]
mod tests {
    use super::*;

    fn plan(model: &Model, prompt: &str, nth: u64) -> Plan {
        let request = Request::new(prompt);
        let digest = request.digest();
        model.plan(&request, "key", &digest, nth)
    }

    #[test]
    fn a_heavy_tail_has_the_given_median_and_percentile() {
        let mut rng = Rng::with_seed(7);
        let tokens = Tokens::heavy_tailed(200, 2_000);
        let mut drawn: Vec<u64> = (0..20_000).map(|_| tokens.draw(&mut rng)).collect();
        drawn.sort_unstable();
        assert!((190..=210).contains(&drawn[10_000]), "{}", drawn[10_000]);
        assert!(
            (1_800..=2_200).contains(&drawn[19_800]),
            "{}",
            drawn[19_800]
        );
        assert!(drawn[0] >= 1);
    }

    #[test]
    fn a_repeated_call_has_the_same_answer_and_another_latency() {
        let model = Model {
            latency: Duration::from_secs(1),
            jitter: 0.5,
            ..Model::default()
        };
        let (a, b) = (plan(&model, "p", 0), plan(&model, "p", 1));
        assert_eq!(a.text, b.text);
        assert_ne!(a.total, b.total);
        assert_eq!(plan(&model, "p", 1).total, b.total);
        assert_ne!(plan(&model, "q", 0).text, a.text);
        let reseeded = Model { seed: 1, ..model };
        assert_ne!(plan(&reseeded, "p", 0).text, a.text);
    }

    #[test]
    fn prose_has_a_word_for_each_token() {
        let model = Model {
            output: Some(Tokens::fixed(50)),
            ..Model::default()
        };
        let plan = plan(&model, "p", 0);
        assert_eq!(plan.text.split_whitespace().count(), 50);
        assert!(plan.text.ends_with('.') && !plan.text.contains(".."));
    }

    #[test]
    fn pieces_are_the_text_and_end_with_it() {
        let model = Model {
            first_token: Duration::from_millis(100),
            per_token: Duration::from_millis(10),
            output: Some(Tokens::fixed(11)),
            ..Model::default()
        };
        let plan = plan(&model, "p", 0);
        let pieces = plan.pieces();
        let text: String = pieces.iter().map(|(_, text)| &**text).collect();
        assert_eq!((pieces.len(), text), (11, plan.text.clone()));
        let times: Vec<u128> = pieces.iter().map(|(at, _)| at.as_millis()).collect();
        assert_eq!(times, Vec::from_iter((100..=210).step_by(11)));
        assert_eq!(plan.generated(Duration::from_millis(155)), 5);
        assert_eq!(plan.generated(Duration::from_millis(99)), 0);
    }
}

//! Holds the model against real servers. A random script of statements, cuts, crashes and promotions is played on the
//! simulated cluster and on a real one of the test bed, and each answer is compared. What differs is the model's fault
//! until the opposite is proved.
//!
//! The statements are those that the crate sends: they are taken from a few seeds of the simulation, with their values
//! replaced (`texts.rs`). `plan.rs` makes the scripts, `play.rs` plays them, `sides.rs` has the two clusters, `wire.rs`
//! reads their answers, and `canon.rs` says what of an answer must be the same.
//!
//! `make sim-reality SCRIPTS=50` runs this.

mod canon;
mod plan;
mod play;
mod sides;
mod texts;
mod wire;

pub(crate) use texts::heard;

use self::plan::Plan;
use self::play::{Told, play};
use self::sides::{Real, Simulated};
use self::texts::Texts;

/// How many lines of a story are printed before a difference.
const CONTEXT: usize = 8;
/// How many differences of a script are printed. Those behind the first one may follow from it.
const MOST: usize = 5;

fn setting<T: std::str::FromStr>(name: &str, default: T) -> T {
    std::env::var(name).ok().and_then(|text| text.parse().ok()).unwrap_or(default)
}

/// Plays one script on both sides, and returns the first steps whose answers differ.
fn differences(seed: u64, texts: &Texts) -> Vec<String> {
    let (context, most) = (setting("CONTEXT", CONTEXT), setting("MOST", MOST));
    let plan = Plan::random(seed, texts);
    let simulated = sides::paused().block_on(async { play(Simulated::new(plan.servers), &plan).await });
    let real = sides::awake().block_on(async { play(Real::start(plan.servers).await, &plan).await });
    let differ: Vec<usize> =
        (0..simulated.len().max(real.len())).filter(|at| simulated.get(*at) != real.get(*at)).take(most).collect();
    let Some(first) = differ.first() else { return Vec::new() };
    let story = simulated.iter().take(*first).skip(first.saturating_sub(context)).map(ToString::to_string);
    let of = |side: &[Told], at: usize| side.get(at).map_or_else(|| "nothing".to_owned(), Told::to_string);
    let differ = differ.iter().map(|at| format!("simulated: {}\nreal:      {}", of(&simulated, *at), of(&real, *at)));
    story.chain(differ).collect()
}

#[test]
#[ignore = "needs PostgreSQL, and takes seconds for each script: `make sim-reality`"]
fn the_model_answers_as_real_servers_do() {
    let texts = Texts::from_the_crate();
    println!("{} texts of the crate", texts.len());
    let (first, scripts): (u64, u64) = (setting("FIRST", 1), setting("SCRIPTS", 10));
    let mut differ = Vec::new();
    for seed in first..first + scripts {
        let found = differences(seed, &texts);
        if found.is_empty() {
            println!("script {seed}: the same");
            continue;
        }
        println!("script {seed} DIFFERS:");
        for line in found {
            println!("{line}");
        }
        differ.push(seed);
    }
    println!("{} of {scripts} scripts are answered alike", scripts - differ.len() as u64);
    assert!(differ.is_empty(), "scripts {differ:?} are answered otherwise by real servers");
}

//~ error[E0277]: `Summarise` is not a `Pipeline`
//~ this is not a `Pipeline`
//~ implement `Pipeline` with `async fn run(&self, cx: &Context, input: Input) -> Result<Output>`
//~ or wrap a closure: `pipeline("name", async |cx: Context, input: Input| { .. })`

use throughline::{Context, Pipeline, Result};

struct Summarise;

impl Summarise {
    async fn run(&self, cx: &Context, text: String) -> Result<String> {
        Ok(cx.generate(text).await?.text)
    }
}

fn wants_a_pipeline(_: impl Pipeline) {}

fn main() {
    wants_a_pipeline(Summarise);
}

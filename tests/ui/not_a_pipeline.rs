use throughline::{Context, PipelineExt as _, Result};

struct Summarise;

impl Summarise {
    async fn run(&self, cx: &Context, text: String) -> Result<String> {
        Ok(cx.generate(text).await?.text)
    }
}

fn wants_a_pipeline(_: impl throughline::Pipeline) {}

fn main() {
    wants_a_pipeline(Summarise);
    wants_a_pipeline(throughline::pipeline("ok", |cx: Context, text: String| async move {
        cx.generate(text).await
    }).boxed());
}

// It compiles: so the files beside it fail for what is wrong in them, and not for how they are compiled.

use throughline::{Context, Pipeline, PipelineExt as _, pipeline};

fn wants_a_pipeline(_: impl Pipeline) {}

fn main() {
    let template = String::from("Describe the ");
    let describe = pipeline("describe", async |cx: Context, river: String| {
        cx.generate(format!("{template}{river}.")).await
    });
    wants_a_pipeline(&describe);
    wants_a_pipeline(describe.map(|reply| reply.text.len()));
}

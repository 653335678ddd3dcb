//~ error[E0277]: `{integer}` can be neither iterated nor streamed
//~ not the inputs of a batch
//~ a batch takes any `IntoIterator` (Send, as its iterator) or any `Stream` (Send)

fn main() {}

fn inputs(cx: &throughline::Context) {
    let _ = cx.fan_out("n", 12);
}

fn inputs(cx: &throughline::Context) {
    let _ = cx.fan_out("n", 12);
}

fn main() {}

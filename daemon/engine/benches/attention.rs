//! Attention alone, on heads as Qwen3-30B-A3B has them: what a decoded token reads of the KV cache a second, beside a plain sum
//! of memory in the same run, and what a long prompt takes. Not the speed of a model: `flashctl bench` measures that.
//! `cargo bench -p flash-engine --bench attention`; numbers replace the contexts, without prompts, and `avx2`, or another name that
//! `flashctl bench` shows, the best kernels that this CPU has.

use flash_engine::bench::Attention;

fn main() {
    let asked: Vec<usize> = std::env::args().filter_map(|arg| arg.parse().ok()).collect();
    let prompts = asked.is_empty();
    let contexts = if prompts { vec![1 << 10, 8 << 10, 32 << 10] } else { asked };
    let kernels = std::env::args().skip(1).find(|arg| !arg.starts_with('-') && arg.parse::<usize>().is_err()).map(|name| &*name.leak());
    let shape = |threads| Attention { heads: 32, kv_heads: 4, head_dim: 128, threads, kernels };
    println!("threads  positions   decode: median   GB/s    best   of memory's");
    for threads in [1, 2] {
        for &context in &contexts {
            let decoded = shape(threads).decode(context, 8);
            let [median, best] = [decoded.median_s, decoded.best_s].map(|seconds| decoded.bytes as f64 / seconds / 1e9);
            let (ms, memory) = (1e3 * decoded.median_s, decoded.memory_bytes_s / 1e9);
            println!("{threads:>7} {context:>10} {ms:>11.3} ms {median:>6.1} {best:>7.1} {memory:>7.1} ({:.0}%)", 100.0 * best / memory);
        }
    }
    if !prompts {
        return;
    }
    println!("threads     prompt  seconds a layer   GFLOP/s");
    for (threads, prompt) in [(1, 2 << 10), (2, 2 << 10), (2, 8 << 10)] {
        let (seconds, flops) = shape(threads).prefill(prompt);
        println!("{threads:>7} {prompt:>10} {seconds:>16.3} {:>9.1}", flops / 1e9);
    }
}

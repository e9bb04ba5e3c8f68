//! Attention alone, in the shape of Qwen3-30B-A3B: what decoding reads of the KV cache a second, beside a plain sum of memory
//! in the same run, and what a layer of a long prompt takes. `cargo bench -p flash-engine --bench attention`.

use flash_engine::bench::Attention;

fn main() {
    for threads in [1, 2] {
        let shape = Attention { heads: 32, kv_heads: 4, head_dim: 128, threads };
        for context in [1024, 8 * 1024, 32 * 1024] {
            let decoded = shape.decode(context, 5);
            let speed = decoded.bytes as f64 / decoded.seconds;
            println!(
                "{threads} threads, decode at {context:>6}: {:6.3} ms a layer, {:5.1} GB/s of {:5.1} ({:3.0}%)",
                1e3 * decoded.seconds,
                speed / 1e9,
                decoded.memory_bytes_s / 1e9,
                100.0 * speed / decoded.memory_bytes_s
            );
        }
    }
    let shape = Attention { heads: 32, kv_heads: 4, head_dim: 128, threads: 2 };
    for prompt in [512, 8192] {
        println!("2 threads, prompt of {prompt}: {:.3} s a layer", shape.prefill(prompt, 256));
    }
}

//! Products alone, by every kind of kernels that this CPU has, in turn: what a token reads of weights a second, beside a plain
//! sum of memory in the same run, and what several tokens compute. Not the speed of a model: `flashctl bench` measures that.
//! `cargo bench -p flash-engine --bench products`; arguments replace the bits of a weight, 4, 8 and 16.

use flash_engine::bench::Products;

fn main() {
    let asked: Vec<u8> = std::env::args().filter_map(|arg| arg.parse().ok()).collect();
    println!("bits  group  threads  tokens  kernels         median      GB/s    best  of memory's  GFLOP/s    best");
    for bits in if asked.is_empty() { vec![4, 8, 16] } else { asked } {
        for group in if bits == 16 { vec![64] } else { vec![32, 64, 128] } {
            for (threads, tokens) in [(1, 1), (2, 1), (1, 2), (1, 5), (1, 64)] {
                for m in (Products { bits, group, cols: 2048, tokens, threads }).measure(7) {
                    let [gb, gb_best] = [m.median_s, m.best_s].map(|seconds| m.bytes as f64 / seconds / 1e9);
                    let [gflop, gflop_best] = [m.median_s, m.best_s].map(|seconds| m.operations / seconds / 1e9);
                    println!(
                        "{bits:>4}  {group:>5}  {threads:>7}  {tokens:>6}  {:<12} {:>6.1} ms {gb:>9.1} {gb_best:>7.1} {:>6.1} ({:>3.0}%) {gflop:>8.1} {gflop_best:>7.1}",
                        m.kernels,
                        1e3 * m.median_s,
                        m.memory_bytes_s / 1e9,
                        100e9 * gb_best / m.memory_bytes_s,
                    );
                }
            }
        }
    }
}

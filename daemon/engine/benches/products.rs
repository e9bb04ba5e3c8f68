//! Products alone, by every kind of kernels that this CPU has, in turn: what a token reads of weights a second, beside a plain
//! sum of memory in the same run, and what several tokens compute. Not the speed of a model: `flashctl bench` measures that.
//! `cargo bench -p flash-engine --bench products`; arguments replace what is measured: the bits of a weight, 4, 8 and 16, or the
//! shape of 4-bit matrices, 4096x2048 and 2048x4096, which a token multiplies one after the other, as a model's layers come; or
//! `experts`, for the feed-forward of several experts at once, where `8 x 768` in place of a shape are eight of that width.

use flash_engine::bench::{FeedForwards, Multiplied, Products};

fn main() {
    let (mut bits, mut shapes) = (Vec::new(), Vec::new());
    for arg in std::env::args() {
        bits.extend(arg.parse::<u8>());
        shapes.extend(arg.split_once('x').and_then(|(rows, cols)| Some((rows.parse().ok()?, cols.parse().ok()?))));
    }
    if bits.is_empty() && shapes.is_empty() {
        (bits, shapes) = (vec![4, 8, 16], vec![(4096, 2048), (2048, 4096)]);
    }
    println!("bits  group       shape  threads  tokens  kernels            median      GB/s    best  of memory's  GFLOP/s    best");
    if std::env::args().any(|arg| arg == "experts") {
        return experts();
    }
    for bits in bits {
        for group in if bits == 16 { vec![64] } else { vec![32, 64, 128] } {
            for (threads, tokens) in [(1, 1), (2, 1), (1, 2), (1, 5), (1, 64), (2, 64)] {
                measure(Products { bits, group, rows: None, cols: 2048, tokens, threads }, 7);
            }
        }
    }
    for (rows, cols) in shapes {
        for threads in [1, 2] {
            measure(Products { bits: 4, group: 64, rows: Some(rows), cols, tokens: 1, threads }, 7);
        }
    }
}

/// Experts of flash-tiny-moe's shape and of Qwen3-30B-A3B's, as steps of one and of several tokens use them.
fn experts() {
    for (hidden, width) in [(384, 128), (2048, 768)] {
        for (experts, tokens) in [(8, 1), (27, 1), (16, 2), (8, 4), (32, 32)] {
            let what = format!("   4     64  {experts:>2} x {width:>5}  {:>7}  {tokens:>6}", 2);
            print(&what, &FeedForwards { hidden, width, experts, tokens, threads: 2 }.measure(2000 / tokens));
        }
    }
}

fn measure(of: Products, rounds: usize) {
    let Products { bits, group, rows, cols, tokens, threads } = of;
    for measured in of.measure(rounds) {
        let shape = rows.map_or(format!("{cols} cols"), |rows| format!("{rows}x{cols}"));
        print(&format!("{bits:>4}  {group:>5}  {shape:>10}  {threads:>7}  {tokens:>6}"), &measured);
    }
}

fn print(what: &str, m: &Multiplied) {
    let [gb, gb_best] = [m.median_s, m.best_s].map(|seconds| m.bytes as f64 / seconds / 1e9);
    let [gflop, gflop_best] = [m.median_s, m.best_s].map(|seconds| m.operations / seconds / 1e9);
    println!(
        "{what}  {:<12} {:>8.3} ms {gb:>9.1} {gb_best:>7.1} {:>6.1} ({:>3.0}%) {gflop:>8.1} {gflop_best:>7.1}",
        m.kernels,
        1e3 * m.median_s,
        m.memory_bytes_s / 1e9,
        100e9 * gb_best / m.memory_bytes_s,
    );
}

//! Attention over one span of positions, once for every instruction set: scores, softmax and weighted values of several
//! query heads that read the same keys and values. Splitting a context into spans and joining them is `attention.rs`'s.
//!
//! Lanes are positions while scores are taken (keys lie transposed, so nothing is summed across lanes) and head
//! dimensions while values are. A tile takes T heads at a time, of one row or of several, to load and widen each number
//! once for all of them; a head's arithmetic is the same in every tile.

/// The loops over primitives that the invoking module defines beside those of `kernels`: `mul`, `sub`, `max` (of anything
/// and NaN: NaN or the second), `highest` (lane), `keep` (the first lanes of one, the rest of another), `exponent` (the low
/// bits as the exponent of a power of two) and `prefetch`. `TILE` says how many heads its registers are good for.
macro_rules! attention {
    ($features:literal) => {
        use crate::{
            attention::{BLOCK, Partial, SPAN, Tile},
            portable::Number,
        };

        /// Puts n + 127 into the low bits of `MAGIC` + n, rounded to the nearest: an exponent's place.
        const MAGIC: f32 = 12_582_912.0 + 127.0;

        /// Floats from one head's scores to the next's: a power of two would put all heads' into the same few cache sets.
        const ROW: usize = SPAN + LANES;

        fn attend<N: Number>(tile: &Tile<'_, N>, mut out: Partial<'_>) {
            if !tile.head_dim.is_multiple_of(LANES) {
                return portable::attend(tile, out);
            }
            tile.check(&out);
            // SAFETY: the features were detected (see ISA).
            unsafe { touch(tile) };
            let mut scores = [0.0; TILE * ROW];
            let (mut at, pairs) = (0, tile.pairs());
            while at < pairs {
                // SAFETY: the features were detected (see ISA), and every access lies inside what `check` asserted.
                at += unsafe {
                    match pairs - at {
                        8.. if TILE == 8 => attend_tile::<N, TILE>(tile, at, &mut scores, &mut out),
                        4.. => attend_tile::<N, 4>(tile, at, &mut scores, &mut out),
                        2.. => attend_tile::<N, 2>(tile, at, &mut scores, &mut out),
                        _ => attend_tile::<N, 1>(tile, at, &mut scores, &mut out),
                    }
                };
            }
        }

        /// Has the processor look up where the span's pages are. On Zen 4 a prefetch into a page that it has forgotten waits
        /// for that, which takes long in a virtual machine: met one by one such pages cost a fifth of a long context's speed,
        /// asked for together they cost little.
        #[target_feature(enable = $features)]
        unsafe fn touch<N: Number>(tile: &Tile<'_, N>) {
            for run in tile.keys.iter().chain(tile.values) {
                run.chunks(4096 / size_of::<N>()).for_each(|page| prefetch(page.as_ptr().cast()));
            }
        }

        /// Pairs `at` to `at` + T; returns T.
        #[target_feature(enable = $features)]
        unsafe fn attend_tile<N: Number, const T: usize>(
            tile: &Tile<'_, N>,
            at: usize,
            scores: &mut [f32; TILE * ROW],
            out: &mut Partial<'_>,
        ) -> usize {
            let d = tile.head_dim;
            let counts: [usize; T] = std::array::from_fn(|t| tile.count(at + t));
            let (least, most) = counts.iter().fold((SPAN, 0), |(least, most), count| (least.min(*count), most.max(*count)));
            let scores = scores.as_mut_ptr();
            let acc = &mut out.acc[at * d..(at + T) * d];
            acc.fill(0.0);
            let acc = acc.as_mut_ptr();
            // SAFETY: `check` asserted the lengths: most ≤ blocks × BLOCK ≤ SPAN, blocks of BLOCK × d, queries and sums of d.
            unsafe {
                let queries: [*const f32; T] = std::array::from_fn(|t| tile.query(at + t).as_ptr());
                let blocks = most.div_ceil(BLOCK);
                // Few heads leave registers over, and sums that wait for each other: then several blocks side by side.
                let mut block = 0;
                while block < blocks {
                    block += match blocks - block {
                        4.. if T == 1 => scores_of::<N, T, 4>(tile, block, blocks, queries, counts, scores),
                        2.. if T <= 2 => scores_of::<N, T, 2>(tile, block, blocks, queries, counts, scores),
                        _ => scores_of::<N, T, 1>(tile, block, blocks, queries, counts, scores),
                    };
                }
                for t in 0..T {
                    (out.max[at + t], out.sum[at + t]) = softmax(scores.add(t * ROW), counts[t]);
                }
                // Those that all see, then what single heads see besides.
                for (block, values) in tile.values[..blocks].iter().enumerate() {
                    let first = block * BLOCK;
                    let next = tile.values.get(block + 1).unwrap_or(values).as_ptr();
                    let end = least.clamp(first, first + BLOCK) - first;
                    let weights: [*const f32; T] = std::array::from_fn(|t| scores.add(t * ROW + first).cast_const());
                    values_tile(values.as_ptr(), 0..end, d, weights, std::array::from_fn(|t| acc.add(t * d)), next);
                    for t in 0..T {
                        let own = counts[t].clamp(first, first + BLOCK) - first;
                        if own > end {
                            values_tile(values.as_ptr(), end..own, d, [weights[t]], [acc.add(t * d)], next);
                        }
                    }
                }
            }
            T
        }

        /// Scores of T queries with B blocks from `block` on, in order of the head's dimensions; returns B. Meanwhile the blocks
        /// that come next are fetched, a row for a row.
        #[inline]
        #[target_feature(enable = $features)]
        unsafe fn scores_of<N: Number, const T: usize, const B: usize>(
            tile: &Tile<'_, N>,
            block: usize,
            blocks: usize,
            queries: [*const f32; T],
            counts: [usize; T],
            scores: *mut f32,
        ) -> usize {
            let next: [*const N; B] = std::array::from_fn(|b| {
                let next = block + B + b;
                if next < blocks { tile.keys[next].as_ptr() } else { tile.values[(next - blocks).min(blocks - 1)].as_ptr() }
            });
            for first in (0..BLOCK).step_by(2 * LANES) {
                let mut sums = [[[splat(0.0); 2]; B]; T];
                for i in 0..tile.head_dim {
                    for b in 0..B {
                        // SAFETY: `check` asserted blocks of [d, BLOCK] numbers and queries of d.
                        unsafe {
                            prefetch(next[b].add(i * BLOCK + first).cast());
                            let keys = tile.keys[block + b].as_ptr().add(i * BLOCK + first);
                            let keys = [number(keys), number(keys.add(LANES))];
                            for t in 0..T {
                                let q = splat(*queries[t].add(i));
                                sums[t][b] = [fma(keys[0], q, sums[t][b][0]), fma(keys[1], q, sums[t][b][1])];
                            }
                        }
                    }
                }
                for t in 0..T {
                    for (half, sum) in sums[t].into_iter().flatten().enumerate() {
                        let position = (block + half / 2) * BLOCK + first + half % 2 * LANES;
                        let seen = keep(mul(sum, splat(tile.scale)), counts[t].saturating_sub(position), splat(f32::NEG_INFINITY));
                        // SAFETY: rows of SPAN scores.
                        unsafe { store(scores.add(t * ROW + position), seen) };
                    }
                }
            }
            B
        }

        /// acc[t] += Σ weights[t][i] × values[i] over `range`, in that order.
        #[inline]
        #[target_feature(enable = $features)]
        unsafe fn values_tile<N: Number, const T: usize>(
            values: *const N,
            range: Range<usize>,
            d: usize,
            weights: [*const f32; T],
            acc: [*mut f32; T],
            next: *const N,
        ) {
            let mut at = 0;
            // SAFETY: the caller promises a block of [BLOCK, d] values, weights for `range`, sums of d, and a `next` as large as
            // a block; at + W × LANES ≤ d.
            unsafe {
                // As above: few heads, several columns.
                while T == 1 && at + 8 * LANES <= d {
                    values_columns::<N, T, 8>(values.add(at), range.clone(), d, weights, acc.map(|acc| acc.add(at)), next.add(at * BLOCK));
                    at += 8 * LANES;
                }
                while T <= 2 && at + 4 * LANES <= d {
                    values_columns::<N, T, 4>(values.add(at), range.clone(), d, weights, acc.map(|acc| acc.add(at)), next.add(at * BLOCK));
                    at += 4 * LANES;
                }
                while at + 2 * LANES <= d {
                    values_columns::<N, T, 2>(values.add(at), range.clone(), d, weights, acc.map(|acc| acc.add(at)), next.add(at * BLOCK));
                    at += 2 * LANES;
                }
                if at < d {
                    values_columns::<N, T, 1>(values.add(at), range, d, weights, acc.map(|acc| acc.add(at)), next.add(at * BLOCK));
                }
            }
        }

        /// As [`values_tile`], for W × LANES columns; `next` is fetched in its own order, which is what memory likes best.
        #[inline]
        #[target_feature(enable = $features)]
        unsafe fn values_columns<N: Number, const T: usize, const W: usize>(
            values: *const N,
            range: Range<usize>,
            d: usize,
            weights: [*const f32; T],
            acc: [*mut f32; T],
            next: *const N,
        ) {
            // SAFETY: the promise of `values_tile`.
            unsafe {
                let mut sums: [[V; W]; T] = std::array::from_fn(|t| std::array::from_fn(|w| load(acc[t].add(w * LANES))));
                for i in range {
                    prefetch(next.add(i * W * LANES).cast());
                    let values: [V; W] = std::array::from_fn(|w| number(values.add(i * d + w * LANES)));
                    for t in 0..T {
                        let weight = splat(*weights[t].add(i));
                        for w in 0..W {
                            sums[t][w] = fma(values[w], weight, sums[t][w]);
                        }
                    }
                }
                for t in 0..T {
                    for w in 0..W {
                        store(acc[t].add(w * LANES), sums[t][w]);
                    }
                }
            }
        }

        /// Makes weights e^(score − max) of `count` scores and of those up to the next whole vector, which are −∞; returns the
        /// maximum and the weights' sum.
        #[target_feature(enable = $features)]
        unsafe fn softmax(scores: *mut f32, count: usize) -> (f32, f32) {
            // SAFETY: the caller promises the scores; SPAN is whole vectors.
            unsafe {
                let mut highest_of = load(scores);
                for at in (LANES..count).step_by(LANES) {
                    highest_of = max(load(scores.add(at)), highest_of);
                }
                let highest = highest(highest_of);
                let mut sum = splat(0.0);
                for at in (0..count).step_by(LANES) {
                    let weight = exp(sub(load(scores.add(at)), splat(highest)));
                    store(scores.add(at), weight);
                    sum = fma(weight, splat(1.0), sum);
                }
                (highest, total(sum))
            }
        }

        /// e^x for x ≤ 0, and 0 below −88: 2ⁿ × e^r with Cephes' polynomial for |r| ≤ ln 2 / 2 (`expf`, an error of 2 in the last
        /// place at most). NaN stays NaN.
        #[inline]
        #[target_feature(enable = $features)]
        pub(super) fn exp(x: V) -> V {
            let x = max(splat(-88.0), x);
            let shifted = fma(x, splat(std::f32::consts::LOG2_E), splat(MAGIC));
            let n = sub(shifted, splat(MAGIC));
            // ln 2 in two parts, the first with few enough bits that n times it is exact.
            let r = fma(n, splat(2.121_944_4e-4), fma(n, splat(-355.0 / 512.0), x));
            let mut p = splat(1.987_569_2e-4);
            for coefficient in [1.398_199_9e-3, 8.333_452e-3, 4.166_579_6e-2, 1.666_666_5e-1, 0.5] {
                p = fma(p, r, splat(coefficient));
            }
            let e = sub(fma(p, mul(r, r), r), splat(-1.0));
            mul(e, exponent(shifted))
        }

        /// LANES numbers, f16 or f32, widened.
        #[inline]
        #[target_feature(enable = $features)]
        unsafe fn number<N: Number>(from: *const N) -> V {
            // SAFETY: the caller promises as many; `Number` is f16 or f32.
            unsafe { if size_of::<N>() == 2 { load_f16(from.cast()) } else { load(from.cast()) } }
        }
    };
}
pub(super) use attention;

//! Products with 4- and 8-bit weights on AVX2's multiplication of 16-bit numbers that adds pairs; everything else is `avx2.rs`.
//!
//! Activations are the 16-bit fixed point of `avx512vnni.rs`, x ≈ scale·i with a scale for each group of columns, here in one piece: codes
//! become as wide as they by a shift and a mask, their products are sums of 32 bits, and within a group Σ q·i is exact.
//!
//! A block is 32 bytes of codes. As 16-bit numbers each holds 16 / BITS codes; a plane is the codes at one shift, and the activations of
//! a block lie in as many planes.

use std::{arch::x86_64::*, array::from_fn, mem::MaybeUninit, ops::Range};

use super::{Bf16, F16, F32, FIXED_MAX, Isa, PREFETCH_ROWS, Param, TOKENS_MAX, ahead, avx2, avx512, by_kind, fixed_point};
use crate::{
    backend::cpu::matrix::{Acts, Fixed, FixedRow, Matrix},
    model::weights::{Float, Format},
};

pub(super) const ISA: Isa = Isa {
    name: "avx2",
    rows,
    fixed: Some(|x, fixed| {
        // SAFETY: here and below, `Isa::available` hands this table out only where the features were detected.
        unsafe { to_fixed(x, fixed) }
    }),
    ..avx2::ISA
};

/// Where the CPU has AVX-512, but not its dot product of bytes.
pub(super) const WITH_AVX512: Isa = Isa {
    rows: |w, range, x, tokens, out| match w.format {
        Format::Affine { .. } => rows(w, range, x, tokens, out),
        _ => (avx512::ISA.rows)(w, range, x, tokens, out),
    },
    fixed: ISA.fixed,
    ..avx512::ISA
};

/// Of a tile: with as many sums in registers, each vector of activations serves four products. 3 × 3 was 6% slower, 2 × 4 14%.
const ROWS: usize = 4;
const TOKENS: usize = 2;
/// Groups whose scales are one vector.
const CHUNK: usize = 8;
/// Of a row's codes in one chunk, as vectors of 16-bit numbers; groups have at most 128 columns.
const WIDE: usize = CHUNK * 128 / 16;

fn rows(w: &Matrix<'_>, range: Range<usize>, x: &Acts<'_>, tokens: &[u32], out: &mut [f32]) {
    let Some(kind) = fixed_point(w, &range, x, tokens, out) else { return (avx2::ISA.rows)(w, range, x, tokens, out) };
    // SAFETY: the features were detected (see ISA) and every access of the tiles lies inside what `fixed_point` asserted.
    unsafe { by_kind!(kind, product, (w, range, x, tokens, out)) }
}

/// `count` numbers, which must be readable with all before them, and zeros.
#[inline]
#[target_feature(enable = "avx2,fma,f16c")]
unsafe fn some<P: Param>(from: *const u8, at: usize, count: usize) -> __m256 {
    // SAFETY: the caller's promise.
    unsafe {
        if count == CHUNK {
            return avx2::wide::<P>(from.add(at * P::BYTES));
        }
        if at + count < CHUNK {
            let mut few = [0.0; CHUNK];
            (0..count).for_each(|i| few[i] = P::get(from, at + i));
            return avx2::load(few.as_ptr());
        }
        // The last eight, moved to the front.
        let (lane, count) = (_mm256_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7), count as i32);
        let eight = avx2::wide::<P>(from.add((at + count as usize - CHUNK) * P::BYTES));
        let moved = _mm256_permutevar8x32_ps(eight, _mm256_add_epi32(lane, _mm256_set1_epi32(8 - count)));
        _mm256_and_ps(moved, _mm256_castsi256_ps(_mm256_cmpgt_epi32(_mm256_set1_epi32(count), lane)))
    }
}

/// The codes of one plane.
#[inline]
#[target_feature(enable = "avx2,fma,f16c")]
fn plane<const BITS: usize>(codes: __m256i, plane: usize) -> __m256i {
    let mask = _mm256_set1_epi16((1 << BITS) - 1);
    match plane * BITS {
        0 => _mm256_and_si256(codes, mask),
        4 => _mm256_and_si256(_mm256_srli_epi16::<4>(codes), mask),
        8 if BITS == 4 => _mm256_and_si256(_mm256_srli_epi16::<8>(codes), mask),
        8 => _mm256_srli_epi16::<8>(codes),
        _ => _mm256_srli_epi16::<12>(codes),
    }
}

/// The block at `from`, of which `left` bytes are left of the row: 32 or, with groups of 32 columns, 16 at its end.
#[inline]
#[target_feature(enable = "avx2,fma,f16c")]
unsafe fn block(from: *const u8, left: usize) -> __m256i {
    // SAFETY: the caller's promise.
    unsafe { if left >= 32 { _mm256_loadu_si256(from.cast()) } else { _mm256_zextsi128_si256(_mm_loadu_si128(from.cast())) } }
}

/// How a row of codes is cut.
#[derive(Clone, Copy)]
struct Cut {
    groups: usize,
    /// Bytes of a row.
    bytes: usize,
    /// Of a group.
    blocks: usize,
    /// Of a chunk that is whole.
    steps: usize,
    /// Which of a chunk's groups the lanes of its first step belong to, and how far the next step is.
    lanes: __m256i,
    next: __m256i,
}

impl Cut {
    #[inline]
    #[target_feature(enable = "avx2,fma,f16c")]
    fn new<const BITS: usize>(w: &Matrix<'_>, group: usize) -> Self {
        let columns = 256 / BITS;
        let (per_step, lanes) = if group < columns { (2, _mm256_setr_epi32(0, 0, 0, 0, 1, 1, 1, 1)) } else { (1, _mm256_setzero_si256()) };
        let next = _mm256_set1_epi32(per_step as i32);
        Self { groups: w.cols / group, bytes: w.row_bytes(), blocks: (group / columns).max(1), steps: CHUNK / per_step, lanes, next }
    }
}

#[target_feature(enable = "avx2,fma,f16c")]
unsafe fn product<const BITS: usize, P: Param>(w: &Matrix<'_>, range: Range<usize>, x: &Acts<'_>, tokens: &[u32], out: &mut [f32]) {
    let cut = Cut::new::<BITS>(w, x.group);
    let mut row = range.start;
    while row < range.end {
        let out = &mut out[(row - range.start) * tokens.len()..];
        let whole = row + ROWS <= range.end;
        // SAFETY: `fixed_point` checked the lengths.
        unsafe {
            match (tokens, whole) {
                ([token], true) => one::<BITS, P, ROWS>(&cut, w, row, x, *token as usize, out),
                ([token], false) => one::<BITS, P, 1>(&cut, w, row, x, *token as usize, out),
                (_, true) => many::<BITS, P, ROWS>(&cut, w, row, x, tokens, out),
                (_, false) => many::<BITS, P, 1>(&cut, w, row, x, tokens, out),
            }
        }
        row += if whole { ROWS } else { 1 };
    }
}

/// R rows × one token: codes go from memory to registers. The sums are those of `many`, in its order.
#[inline]
#[target_feature(enable = "avx2,fma,f16c")]
unsafe fn one<const BITS: usize, P: Param, const R: usize>(
    cut: &Cut,
    w: &Matrix<'_>,
    row: usize,
    x: &Acts<'_>,
    token: usize,
    out: &mut [f32],
) {
    let Cut { groups, bytes, .. } = *cut;
    // SAFETY: `fixed_point` checked every length that these pointers are moved within.
    unsafe {
        let codes: [*const u8; R] = from_fn(|r| w.weight.as_ptr().add((row + r) * bytes));
        let mut ahead = codes[0].wrapping_add(ahead::<R>(bytes));
        prefetch_sides::<R>(w, row);
        let mut xs: *const __m256i = x.fixed.bytes.as_ptr().add(token * Fixed::row_bytes(w.cols, BITS as u8)).cast();
        let mut total = [_mm256_setzero_ps(); R];
        let mut at = 0;
        for first in (0..groups).step_by(CHUNK) {
            let here = (groups - first).min(CHUNK);
            let x_scales = some::<F32>(x.fixed.scales.as_ptr().cast(), token * groups + first, here);
            let sums = some::<F32>(x.sums.as_ptr().cast(), token * groups + first, here);
            let mut scales = [_mm256_setzero_ps(); R];
            for r in 0..R {
                let from = (row + r) * groups + first;
                scales[r] = _mm256_mul_ps(some::<P>(w.scales.as_ptr(), from, here), x_scales);
                total[r] = _mm256_fmadd_ps(some::<P>(w.biases.as_ptr(), from, here), sums, total[r]);
            }
            let mut lanes = cut.lanes;
            for _ in 0..(here * cut.steps).div_ceil(CHUNK) {
                let mut dots = [_mm256_setzero_si256(); R];
                for _ in 0..cut.blocks {
                    let blocks: [__m256i; R] = from_fn(|r| block(codes[r].add(at), bytes - at));
                    for p in 0..16 / BITS {
                        let x = _mm256_loadu_si256(xs);
                        xs = xs.add(1);
                        for r in 0..R {
                            dots[r] = _mm256_add_epi32(dots[r], _mm256_madd_epi16(plane::<BITS>(blocks[r], p), x));
                        }
                    }
                    // Two blocks a line.
                    for _ in 0..if at % 64 == 0 { R.div_ceil(2) } else { R / 2 } {
                        _mm_prefetch::<_MM_HINT_T0>(ahead.cast());
                        ahead = ahead.wrapping_add(64);
                    }
                    at += 32;
                }
                for r in 0..R {
                    total[r] = _mm256_fmadd_ps(_mm256_permutevar8x32_ps(scales[r], lanes), _mm256_cvtepi32_ps(dots[r]), total[r]);
                }
                lanes = _mm256_add_epi32(lanes, cut.next);
            }
        }
        for r in 0..R {
            out[r] = avx2::total(total[r]);
        }
    }
}

#[inline]
#[target_feature(enable = "avx2,fma,f16c")]
fn prefetch_sides<const R: usize>(w: &Matrix<'_>, row: usize) {
    for side in [w.scales, w.biases] {
        let row_bytes = side.len() / w.rows;
        for r in 0..R {
            _mm_prefetch::<_MM_HINT_T0>(side.as_ptr().wrapping_add((row + r + PREFETCH_ROWS) * row_bytes).cast());
        }
    }
}

/// R rows × all tokens: a chunk's codes are widened once, to the stack. It and the sums leave room in the first cache, through which
/// activations then pass from the second, each for R products.
#[inline]
#[target_feature(enable = "avx2,fma,f16c")]
unsafe fn many<const BITS: usize, P: Param, const R: usize>(
    cut: &Cut,
    w: &Matrix<'_>,
    row: usize,
    x: &Acts<'_>,
    tokens: &[u32],
    out: &mut [f32],
) {
    let Cut { groups, bytes, .. } = *cut;
    let mut wide = [const { MaybeUninit::<[__m256i; R]>::uninit() }; WIDE];
    let mut totals = [const { MaybeUninit::<[__m256; R]>::uninit() }; TOKENS_MAX];
    let totals = &mut totals[..tokens.len()];
    totals.iter_mut().for_each(|total| _ = total.write([_mm256_setzero_ps(); R]));
    // SAFETY: `fixed_point` checked every length that these pointers are moved within.
    unsafe {
        // All were just written.
        let totals = &mut *(totals as *mut [MaybeUninit<[__m256; R]>] as *mut [[__m256; R]]);
        let codes: [*const u8; R] = from_fn(|r| w.weight.as_ptr().add((row + r) * bytes));
        let mut ahead = codes[0].wrapping_add(ahead::<R>(bytes));
        prefetch_sides::<R>(w, row);
        let mut at = 0;
        for first in (0..groups).step_by(CHUNK) {
            let here = (groups - first).min(CHUNK);
            let steps = (here * cut.steps).div_ceil(CHUNK);
            let start = at * 2 * 8 / BITS;
            for i in 0..steps * cut.blocks {
                for r in 0..R {
                    let codes = block(codes[r].add(at), bytes - at);
                    for p in 0..16 / BITS {
                        (*wide[i * (16 / BITS) + p].as_mut_ptr())[r] = plane::<BITS>(codes, p);
                    }
                }
                for _ in 0..if at % 64 == 0 { R.div_ceil(2) } else { R / 2 } {
                    _mm_prefetch::<_MM_HINT_T0>(ahead.cast());
                    ahead = ahead.wrapping_add(64);
                }
                at += 32;
            }
            let part = Part {
                first,
                here,
                steps,
                start,
                scales: from_fn(|r| some::<P>(w.scales.as_ptr(), (row + r) * groups + first, here)),
                biases: from_fn(|r| some::<P>(w.biases.as_ptr(), (row + r) * groups + first, here)),
                wide: wide.as_ptr().cast(),
            };
            let (tiles, rest) = tokens.as_chunks::<TOKENS>();
            let (to_tiles, to_rest) = totals.as_chunks_mut::<TOKENS>();
            for (tile, to) in tiles.iter().zip(to_tiles) {
                part.add::<BITS, TOKENS>(cut, x, *tile, to.each_mut());
            }
            for (token, to) in rest.iter().zip(to_rest) {
                part.add::<BITS, 1>(cut, x, [*token], [to]);
            }
        }
        for (t, total) in totals.iter().enumerate() {
            for r in 0..R {
                out[r * tokens.len() + t] = avx2::total(total[r]);
            }
        }
    }
}

/// A chunk of R rows.
struct Part<const R: usize> {
    /// Its first group, and how many it has.
    first: usize,
    here: usize,
    steps: usize,
    /// Where its activations start in a token's row.
    start: usize,
    scales: [__m256; R],
    biases: [__m256; R],
    /// Codes by planes.
    wide: *const [__m256i; R],
}

impl<const R: usize> Part<R> {
    #[inline]
    #[target_feature(enable = "avx2,fma,f16c")]
    unsafe fn add<const BITS: usize, const T: usize>(&self, cut: &Cut, x: &Acts<'_>, tokens: [u32; T], totals: [&mut [__m256; R]; T]) {
        let stride = Fixed::row_bytes(x.cols, BITS as u8);
        // SAFETY: `fixed_point` checked every length that these pointers are moved within.
        unsafe {
            let mut scales = [[_mm256_setzero_ps(); T]; R];
            for t in 0..T {
                let from = tokens[t] as usize * cut.groups + self.first;
                let x_scales = some::<F32>(x.fixed.scales.as_ptr().cast(), from, self.here);
                let sums = some::<F32>(x.sums.as_ptr().cast(), from, self.here);
                for r in 0..R {
                    scales[r][t] = _mm256_mul_ps(self.scales[r], x_scales);
                    totals[t][r] = _mm256_fmadd_ps(self.biases[r], sums, totals[t][r]);
                }
            }
            let mut xs: [*const __m256i; T] = from_fn(|t| x.fixed.bytes.as_ptr().add(tokens[t] as usize * stride + self.start).cast());
            let (mut wide, mut lanes) = (self.wide, cut.lanes);
            for _ in 0..self.steps {
                let mut dots = [[_mm256_setzero_si256(); T]; R];
                for _ in 0..cut.blocks {
                    for p in 0..16 / BITS {
                        let x: [__m256i; T] = from_fn(|t| _mm256_loadu_si256(xs[t].add(p)));
                        for (dots, w) in dots.iter_mut().zip(&*wide.add(p)) {
                            for t in 0..T {
                                dots[t] = _mm256_add_epi32(dots[t], _mm256_madd_epi16(*w, x[t]));
                            }
                        }
                    }
                    wide = wide.add(16 / BITS);
                    xs = xs.map(|x| x.add(16 / BITS));
                }
                for r in 0..R {
                    for t in 0..T {
                        let scale = _mm256_permutevar8x32_ps(scales[r][t], lanes);
                        totals[t][r] = _mm256_fmadd_ps(scale, _mm256_cvtepi32_ps(dots[r][t]), totals[t][r]);
                    }
                }
                lanes = _mm256_add_epi32(lanes, cut.next);
            }
        }
    }
}

/// One row, half a block at a time: the columns of a block's first or last eight 16-bit numbers, which lie in one group.
#[target_feature(enable = "avx2,fma,f16c")]
unsafe fn to_fixed(x: &[f32], fixed: FixedRow<'_>) {
    fixed.check(x);
    let FixedRow { bits, group, scales, bytes } = fixed;
    let half = 128 / usize::from(bits);
    for (g, (x, scale)) in x.chunks_exact(group).zip(scales).enumerate() {
        let mut most = _mm256_setzero_ps();
        for x in x.chunks_exact(8) {
            // SAFETY: eight floats.
            most = _mm256_max_ps(most, _mm256_andnot_ps(_mm256_set1_ps(-0.0), unsafe { avx2::load(x.as_ptr()) }));
        }
        let most = avx2::highest(most);
        *scale = most / FIXED_MAX;
        let inverse = _mm_set1_ps(if most > 0.0 { FIXED_MAX / most } else { 0.0 });
        for (i, x) in x.chunks_exact(half).enumerate() {
            let index = g * (group / half) + i;
            // SAFETY: `half` floats, and 16 bytes in each of the block's planes.
            unsafe {
                let to = bytes.as_mut_ptr().add(index / 2 * 4 * half + index % 2 * 16);
                // Two vectors' even and odd columns.
                let split = |(a, b)| (_mm_shuffle_ps::<0x88>(a, b), _mm_shuffle_ps::<0xdd>(a, b));
                let four = |at: usize| _mm_loadu_ps(x.as_ptr().add(at));
                let whole = |x| _mm_cvtps_epi32(_mm_mul_ps(x, inverse));
                let put = |plane: usize, a, b| _mm_storeu_si128(to.add(32 * plane).cast(), _mm_packs_epi32(whole(a), whole(b)));
                if bits == 4 {
                    let quarters = |at: usize| {
                        let (even, odd) = split((four(at), four(at + 4)));
                        let (later_even, later_odd) = split((four(at + 8), four(at + 12)));
                        (split((even, later_even)), split((odd, later_odd)))
                    };
                    let (((a, c), (b, d)), ((later_a, later_c), (later_b, later_d))) = (quarters(0), quarters(16));
                    put(0, a, later_a);
                    put(1, b, later_b);
                    put(2, c, later_c);
                    put(3, d, later_d);
                } else {
                    let ((even, odd), (later_even, later_odd)) = (split((four(0), four(4))), split((four(8), four(12))));
                    put(0, even, later_even);
                    put(1, odd, later_odd);
                }
            }
        }
    }
}

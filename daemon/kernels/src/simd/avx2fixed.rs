//! Products with 4- and 8-bit weights on AVX2's multiplication of 16-bit numbers that adds pairs; everything else is `avx2.rs`.
//!
//! Activations are the 16-bit fixed point of `avx512vnni.rs`, x ≈ scale·i with a scale for each group of columns, here in one piece: codes
//! become as wide as they by a shift and a mask, their products are sums of 32 bits, and within a group Σ q·i is exact.
//!
//! A block is 32 bytes of codes. As 16-bit numbers each holds 16 / BITS codes; a plane is the codes at one shift, and the activations of
//! a block lie in as many planes.

use std::{arch::x86_64::*, array::from_fn, mem::MaybeUninit, ops::Range};

use super::{Bf16, Coming, F16, F32, FIXED_MAX, Isa, Param, avx2, avx2attend, avx2narrow, avx512, fixed_point};
use crate::matrix::{Acts, Fixed, FixedRow, Float, Format, Matrix};

pub(super) const ISA: Isa = Isa {
    name: "avx2",
    rows,
    fixed: Some(|x, fixed| {
        // SAFETY: here and below, `Isa::available` hands this table out only where the features were detected.
        unsafe { to_fixed(x, fixed) }
    }),
    attend_fixed: Some(avx2attend::attend),
    ..avx2::ISA
};

/// Where the CPU has AVX-512, but not its dot product of bytes.
pub(super) const WITH_AVX512: Isa = Isa {
    rows: |w, range, x, tokens, out| match w.format {
        Format::Affine { .. } => rows(w, range, x, tokens, out),
        _ => (avx512::ISA.rows)(w, range, x, tokens, out),
    },
    fixed: ISA.fixed,
    attend_fixed: ISA.attend_fixed,
    ..avx512::ISA
};

/// Rows of many tokens' tiles: each vector of activations that is loaded serves as many products, and there are registers for their sums.
const ROWS: usize = 8;
/// Those of up to four tokens.
const ROWS_OF_FEW: usize = 4;
/// Rows whose scales are asked for at once.
pub(super) const SIDES: usize = 16;
const PLANES_MAX: usize = 4;
/// Tokens whose activations stay in the second cache while all rows pass: CPUs share it between two threads.
const TOKENS_NEAR: usize = 16;
/// Groups whose scales are one vector.
pub(super) const CHUNK: usize = 8;
/// Of a row's codes in one chunk, as vectors of 16-bit numbers; groups have at most 128 columns.
const WIDE: usize = CHUNK * 128 / 16;

fn rows(w: &Matrix<'_>, range: Range<usize>, x: &Acts<'_>, tokens: &[u32], out: &mut [f32]) {
    let Some((bits, params)) = fixed_point(w, &range, x, tokens, out) else { return (avx2::ISA.rows)(w, range, x, tokens, out) };
    let product = match (bits, x.group) {
        (4, 32) => product::<4, 32>,
        (4, 64) => product::<4, 64>,
        (4, _) => product::<4, 128>,
        (_, 32) => product::<8, 32>,
        (_, 64) => product::<8, 64>,
        _ => product::<8, 128>,
    };
    // SAFETY: the features were detected (see ISA) and every access of the tiles lies inside what `fixed_point` asserted.
    unsafe { product(params, w, range, x, tokens, out) }
}

/// Scales and biases of `count` groups from `first` on, of R rows, and zeros.
#[inline]
#[target_feature(enable = "avx2,fma,f16c")]
unsafe fn sides<const R: usize>(params: Float, w: &Matrix<'_>, row: usize, groups: usize, first: usize, count: usize) -> [[__m256; R]; 2] {
    let at = row * groups + first;
    // SAFETY: the caller's promise; what is read of rows further on is masked.
    unsafe {
        if at + (R - 1) * groups + CHUNK > w.rows * groups {
            return last_sides(params, w, at, groups, count);
        }
        match params {
            Float::F32 => sides_of::<F32, R>(w, at, groups, count),
            Float::F16 => sides_of::<F16, R>(w, at, groups, count),
            Float::Bf16 => sides_of::<Bf16, R>(w, at, groups, count),
        }
    }
}

#[inline]
#[target_feature(enable = "avx2,fma,f16c")]
unsafe fn sides_of<P: Param, const R: usize>(w: &Matrix<'_>, at: usize, groups: usize, count: usize) -> [[__m256; R]; 2] {
    let mut all = [[_mm256_setzero_ps(); R]; 2];
    for (side, all) in [w.scales, w.biases].iter().zip(&mut all) {
        for (r, of_row) in all.iter_mut().enumerate() {
            // SAFETY: the caller's promise.
            *of_row = _mm256_and_ps(unsafe { avx2::wide::<P>(side.as_ptr().add((at + r * groups) * P::BYTES)) }, lanes(count));
        }
    }
    all
}

/// Where the eight that are read would not all lie in the matrix.
#[cold]
#[inline(never)]
#[target_feature(enable = "avx2,fma,f16c")]
unsafe fn last_sides<const R: usize>(params: Float, w: &Matrix<'_>, at: usize, groups: usize, count: usize) -> [[__m256; R]; 2] {
    [w.scales, w.biases].map(|side| {
        from_fn(|r| {
            let at = at + r * groups;
            // SAFETY: the caller's promise.
            unsafe {
                match params {
                    Float::F32 => some::<F32>(side.as_ptr(), at, count),
                    Float::F16 => some::<F16>(side.as_ptr(), at, count),
                    Float::Bf16 => some::<Bf16>(side.as_ptr(), at, count),
                }
            }
        })
    })
}

/// All bits of the first `count` lanes.
#[inline]
#[target_feature(enable = "avx2,fma,f16c")]
pub(super) fn lanes(count: usize) -> __m256 {
    _mm256_castsi256_ps(_mm256_cmpgt_epi32(_mm256_set1_epi32(count as i32), _mm256_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7)))
}

/// `count` numbers, and zeros.
///
/// # Safety
/// They must be readable, with all before them.
#[inline]
#[target_feature(enable = "avx2,fma,f16c")]
pub(super) unsafe fn some<P: Param>(from: *const u8, at: usize, count: usize) -> __m256 {
    // SAFETY: the caller's promise.
    unsafe {
        if count == CHUNK {
            return avx2::wide::<P>(from.add(at * P::BYTES));
        }
        if count == 0 {
            return _mm256_setzero_ps();
        }
        if at + count < CHUNK {
            let mut few = [0.0; CHUNK];
            (0..count).for_each(|i| few[i] = P::get(from, at + i));
            return avx2::load(few.as_ptr());
        }
        // The last eight, moved to the front.
        let eight = avx2::wide::<P>(from.add((at + count - CHUNK) * P::BYTES));
        let lane = _mm256_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7);
        let moved = _mm256_permutevar8x32_ps(eight, _mm256_add_epi32(lane, _mm256_set1_epi32(8 - count as i32)));
        _mm256_and_ps(moved, lanes(count))
    }
}

/// How rows are cut, by the bits of a code and the columns of a group.
pub(super) struct Cut<const BITS: usize, const GROUP: usize>;

impl<const BITS: usize, const GROUP: usize> Cut<BITS, GROUP> {
    pub(super) const PLANES: usize = 16 / BITS;
    /// Codes in 32 bytes.
    const COLUMNS: usize = 256 / BITS;
    /// What has sums of its own: a group, of so many blocks, or two that share one.
    pub(super) const BLOCKS: usize = if Self::SHARED { 1 } else { GROUP / Self::COLUMNS };
    pub(super) const SHARED: bool = GROUP < Self::COLUMNS;

    /// Of a chunk of so many groups.
    pub(super) fn steps(groups: usize) -> usize {
        if Self::SHARED { groups.div_ceil(2) } else { groups }
    }

    /// The block at `from`, of which `left` bytes are left of the row: where two groups share one, it may be half.
    ///
    /// # Safety
    /// It must be readable.
    #[inline]
    #[target_feature(enable = "avx2,fma,f16c")]
    pub(super) unsafe fn block(from: *const u8, left: usize) -> __m256i {
        // SAFETY: the caller's promise.
        unsafe {
            if Self::SHARED && left < 32 { _mm256_zextsi128_si256(_mm_loadu_si128(from.cast())) } else { _mm256_loadu_si256(from.cast()) }
        }
    }

    /// The codes of one plane.
    #[inline]
    #[target_feature(enable = "avx2,fma,f16c")]
    pub(super) fn plane(codes: __m256i, plane: usize) -> __m256i {
        let mask = _mm256_set1_epi16((1 << BITS) - 1);
        match plane * BITS {
            0 => _mm256_and_si256(codes, mask),
            4 => _mm256_and_si256(_mm256_srli_epi16::<4>(codes), mask),
            8 if BITS == 4 => _mm256_and_si256(_mm256_srli_epi16::<8>(codes), mask),
            8 => _mm256_srli_epi16::<8>(codes),
            _ => _mm256_srli_epi16::<12>(codes),
        }
    }
}

/// A step's codes × T tokens' activations. A macro, so that it is compiled as part of each tile.
macro_rules! dots {
    ($bits:ident, $group:ident, $t:ident, $codes:expr, $left:expr, $xs:ident) => {{
        let mut dots = [_mm256_setzero_si256(); $t];
        for b in 0..Cut::<$bits, $group>::BLOCKS {
            let codes = Cut::<$bits, $group>::block($codes.add(32 * b), $left);
            for p in 0..Cut::<$bits, $group>::PLANES {
                let w = Cut::<$bits, $group>::plane(codes, p);
                for t in 0..$t {
                    let x = _mm256_loadu_si256($xs[t].add(b * Cut::<$bits, $group>::PLANES + p));
                    dots[t] = _mm256_add_epi32(dots[t], _mm256_madd_epi16(w, x));
                }
            }
        }
        dots
    }};
}
pub(super) use dots;

/// Scales of a chunk's groups, where each can be had for all lanes by one load: the units that shuffle have enough to do.
#[derive(Clone, Copy)]
#[repr(C, align(32))]
struct Scales([f32; CHUNK]);

impl Scales {
    #[inline]
    #[target_feature(enable = "avx2,fma,f16c")]
    fn new(scales: __m256) -> Self {
        let mut all = [0.0; CHUNK];
        // SAFETY: eight floats.
        unsafe { _mm256_storeu_ps(all.as_mut_ptr(), scales) };
        Self(all)
    }

    /// Of a step's lanes.
    #[inline]
    #[target_feature(enable = "avx2,fma,f16c")]
    fn of(&self, step: usize, shared: bool) -> __m256 {
        if shared {
            let [low, high] = [2 * step, 2 * step + 1].map(|group| _mm_set1_ps(self.0[group % CHUNK]));
            _mm256_set_m128(high, low)
        } else {
            _mm256_set1_ps(self.0[step % CHUNK])
        }
    }
}

#[target_feature(enable = "avx2,fma,f16c")]
unsafe fn product<const BITS: usize, const GROUP: usize>(
    params: Float,
    w: &Matrix<'_>,
    range: Range<usize>,
    x: &Acts<'_>,
    tokens: &[u32],
    out: &mut [f32],
) {
    let coming = Coming::new(w, range.end);
    for (tile, near) in tokens.chunks(TOKENS_NEAR).enumerate() {
        let out = &mut out[tile * TOKENS_NEAR * range.len()..];
        // SAFETY: `fixed_point` checked the lengths.
        unsafe {
            match *near {
                [a] => narrow_column::<BITS, GROUP, 1>(params, &coming, range.clone(), x, [a], out),
                [a, b] => narrow_column::<BITS, GROUP, 2>(params, &coming, range.clone(), x, [a, b], out),
                [a, b, c] => column::<BITS, GROUP, 3>(params, &coming, range.clone(), x, [a, b, c], out, range.len()),
                [a, b, c, d] => column::<BITS, GROUP, 4>(params, &coming, range.clone(), x, [a, b, c, d], out, range.len()),
                _ => {
                    let (mut row, height) = (range.start, range.len());
                    while row < range.end {
                        let out = &mut out[row - range.start..];
                        row += if range.end - row >= ROWS {
                            many::<BITS, GROUP, ROWS>(params, &coming, row, x, near, out, height)
                        } else {
                            many::<BITS, GROUP, 1>(params, &coming, row, x, near, out, height)
                        };
                    }
                }
            }
        }
    }
}

/// As `column`; rows of at most CHUNK groups by eights first, which for one and two tokens takes less.
#[target_feature(enable = "avx2,fma,f16c")]
unsafe fn narrow_column<const BITS: usize, const GROUP: usize, const T: usize>(
    params: Float,
    coming: &Coming<'_>,
    range: Range<usize>,
    x: &Acts<'_>,
    tokens: [u32; T],
    out: &mut [f32],
) {
    let height = range.len();
    let eights = if x.cols / GROUP <= CHUNK { height / avx2narrow::ROWS * avx2narrow::ROWS } else { 0 };
    let between = range.start + eights;
    // SAFETY: `fixed_point` checked the lengths.
    unsafe {
        if eights > 0 {
            avx2narrow::column::<BITS, GROUP, T>(params, coming, range.start..between, x, tokens, out, height);
        }
        if eights < height {
            column::<BITS, GROUP, T>(params, coming, between..range.end, x, tokens, &mut out[eights..], height);
        }
    }
}

/// All rows for T tokens, a tile at a time; out[t × height + r].
#[inline(never)]
#[target_feature(enable = "avx2,fma,f16c")]
unsafe fn column<const BITS: usize, const GROUP: usize, const T: usize>(
    params: Float,
    coming: &Coming<'_>,
    range: Range<usize>,
    x: &Acts<'_>,
    tokens: [u32; T],
    out: &mut [f32],
    height: usize,
) {
    let groups = x.cols / GROUP;
    let mut row = range.start;
    let (rest, whole) = (groups % CHUNK, groups - groups % CHUNK);
    // SAFETY: `fixed_point` checked the lengths.
    unsafe {
        let last = [x.fixed.scales, x.sums].map(|of| tokens.map(|t| some::<F32>(of.as_ptr().cast(), t as usize * groups + whole, rest)));
        while row < range.end {
            let out = &mut out[row - range.start..];
            row += if range.end - row >= ROWS_OF_FEW {
                few::<BITS, GROUP, ROWS_OF_FEW, T>(params, coming, row, x, tokens, &last, out, height)
            } else {
                few::<BITS, GROUP, 1, T>(params, coming, row, x, tokens, &last, out, height)
            };
        }
    }
}

/// R rows × T tokens: codes go from memory to registers. `last` are the tokens' scales and sums of what is left after whole chunks. The
/// sums are those of `many`, in its order. Gives R.
#[inline]
#[target_feature(enable = "avx2,fma,f16c")]
#[expect(clippy::too_many_arguments, reason = "what a tile is of, and what its column has loaded")]
unsafe fn few<const BITS: usize, const GROUP: usize, const R: usize, const T: usize>(
    params: Float,
    coming: &Coming<'_>,
    row: usize,
    x: &Acts<'_>,
    tokens: [u32; T],
    last: &[[__m256; T]; 2],
    out: &mut [f32],
    height: usize,
) -> usize {
    let Coming { w, bytes, .. } = *coming;
    let (groups, blocks, planes) = (w.cols / GROUP, Cut::<BITS, GROUP>::BLOCKS, Cut::<BITS, GROUP>::PLANES);
    let tokens = tokens.map(|token| token as usize);
    // SAFETY: `fixed_point` checked every length that these pointers are moved within.
    unsafe {
        let mut codes = w.weight.as_ptr().add(row * bytes);
        let mut xs: [*const __m256i; T] =
            tokens.map(|token| x.fixed.bytes.as_ptr().add(token * Fixed::row_bytes(w.cols, BITS as u8)).cast());
        let mut ahead = coming.codes::<R>(row);
        if row.is_multiple_of(SIDES) {
            coming.sides(row, SIDES);
        }
        let mut totals = [[_mm256_setzero_ps(); T]; R];
        let mut at = 0;
        for first in (0..groups).step_by(CHUNK) {
            let here = (groups - first).min(CHUNK);
            let [x_scales, sums] = if here < CHUNK {
                *last
            } else {
                [x.fixed.scales, x.sums].map(|of| tokens.map(|token| avx2::load(of.as_ptr().add(token * groups + first))))
            };
            let mut scales = [[Scales([0.0; CHUNK]); T]; R];
            let [of_rows, biases] = sides::<R>(params, w, row, groups, first, here);
            for r in 0..R {
                for t in 0..T {
                    scales[r][t] = Scales::new(_mm256_mul_ps(of_rows[r], x_scales[t]));
                    totals[r][t] = _mm256_fmadd_ps(biases[r], sums[t], totals[r][t]);
                }
            }
            for step in 0..Cut::<BITS, GROUP>::steps(here) {
                for r in 0..R {
                    let dots = dots!(BITS, GROUP, T, codes.add(r * bytes), bytes - at, xs);
                    for t in 0..T {
                        let scale = scales[r][t].of(step, Cut::<BITS, GROUP>::SHARED);
                        totals[r][t] = _mm256_fmadd_ps(scale, _mm256_cvtepi32_ps(dots[t]), totals[r][t]);
                    }
                }
                ahead = prefetch_codes::<R>(ahead, at, blocks);
                at += 32 * blocks;
                codes = codes.add(32 * blocks);
                xs = xs.map(|x| x.add(blocks * planes));
            }
        }
        for t in 0..T {
            put::<R>(from_fn(|r| totals[r][t]), &mut out[t * height..]);
        }
    }
    R
}

/// The sums of R vectors' lanes; four together, in `total`'s order.
#[inline]
#[target_feature(enable = "avx2,fma,f16c")]
pub(super) fn put<const R: usize>(totals: [__m256; R], out: &mut [f32]) {
    let (fours, rest) = totals.as_chunks::<4>();
    for (of, [a, b, c, d]) in fours.iter().enumerate() {
        let halves = |a, b| _mm256_add_ps(_mm256_permute2f128_ps::<0x20>(a, b), _mm256_permute2f128_ps::<0x31>(a, b));
        let (ab, cd) = (halves(*a, *b), halves(*c, *d));
        let two = _mm256_add_ps(_mm256_shuffle_ps::<0x44>(ab, cd), _mm256_shuffle_ps::<0xee>(ab, cd));
        let one = _mm256_add_ps(two, _mm256_movehdup_ps(two));
        let (ac, bd) = (_mm256_castps256_ps128(one), _mm256_extractf128_ps::<1>(one));
        let all = _mm_blend_ps::<0b1010>(ac, _mm_moveldup_ps(bd));
        let out = &mut out[4 * of..][..4];
        // SAFETY: four floats.
        unsafe { _mm_storeu_ps(out.as_mut_ptr(), all) };
    }
    let done = R - rest.len();
    rest.iter().enumerate().for_each(|(r, total)| out[done + r] = avx2::total(*total));
}

/// As many lines as R rows of so many blocks are, two blocks a line; where the next of them are.
#[inline]
#[target_feature(enable = "avx2,fma,f16c")]
pub(super) fn prefetch_codes<const R: usize>(mut ahead: *const u8, at: usize, blocks: usize) -> *const u8 {
    for b in 0..blocks {
        for _ in 0..if (at / 32 + b).is_multiple_of(2) { R.div_ceil(2) } else { R / 2 } {
            _mm_prefetch::<_MM_HINT_T0>(ahead.cast());
            ahead = ahead.wrapping_add(64);
        }
    }
    ahead
}

/// R rows × all tokens: a chunk's codes are widened once, to the stack. It and the sums leave room in the first cache, through which
/// activations then pass from the second, each for R products. Gives R.
#[inline]
#[target_feature(enable = "avx2,fma,f16c")]
unsafe fn many<const BITS: usize, const GROUP: usize, const R: usize>(
    params: Float,
    coming: &Coming<'_>,
    row: usize,
    x: &Acts<'_>,
    tokens: &[u32],
    out: &mut [f32],
    height: usize,
) -> usize {
    let Coming { w, bytes, .. } = *coming;
    let (groups, blocks, planes) = (w.cols / GROUP, Cut::<BITS, GROUP>::BLOCKS, Cut::<BITS, GROUP>::PLANES);
    let mut wide = [const { MaybeUninit::<[__m256i; R]>::uninit() }; WIDE];
    let mut totals = [const { MaybeUninit::<[__m256; R]>::uninit() }; TOKENS_NEAR];
    let totals = &mut totals[..tokens.len()];
    totals.iter_mut().for_each(|total| _ = total.write([_mm256_setzero_ps(); R]));
    // SAFETY: `fixed_point` checked every length that these pointers are moved within.
    unsafe {
        // All were just written.
        let totals = &mut *(totals as *mut [MaybeUninit<[__m256; R]>] as *mut [[__m256; R]]);
        let codes: [*const u8; R] = from_fn(|r| w.weight.as_ptr().add((row + r) * bytes));
        let mut ahead = coming.codes::<R>(row);
        coming.sides(row, R);
        let mut at = 0;
        for first in (0..groups).step_by(CHUNK) {
            let here = (groups - first).min(CHUNK);
            let steps = Cut::<BITS, GROUP>::steps(here);
            let start = at * 2 * 8 / BITS;
            for i in 0..steps * blocks {
                let of_block = &mut wide[i * planes..(i + 1) * planes];
                for r in 0..R {
                    let codes = Cut::<BITS, GROUP>::block(codes[r].add(at), bytes - at);
                    for (p, rows) in of_block.iter_mut().enumerate() {
                        (*rows.as_mut_ptr())[r] = Cut::<BITS, GROUP>::plane(codes, p);
                    }
                }
                ahead = prefetch_codes::<R>(ahead, at, 1);
                at += 32;
            }
            let [scales, biases] = sides::<R>(params, w, row, groups, first, here);
            let part = Part { first, here, start, scales, biases, wide: wide.as_ptr().cast() };
            for (token, totals) in tokens.iter().zip(&mut *totals) {
                part.add::<BITS, GROUP>(x, *token as usize, totals);
            }
        }
        for (t, totals) in totals.iter().enumerate() {
            put(*totals, &mut out[t * height..]);
        }
    }
    R
}

/// A chunk of R rows.
struct Part<const R: usize> {
    /// Its first group, and how many it has.
    first: usize,
    here: usize,
    /// Where its activations start in a token's row.
    start: usize,
    scales: [__m256; R],
    biases: [__m256; R],
    /// Codes by planes.
    wide: *const [__m256i; R],
}

impl<const R: usize> Part<R> {
    /// Every load but those of activations is part of an instruction that multiplies or adds: their number is what this takes.
    #[expect(clippy::needless_range_loop, reason = "with iterators, what it compiles to was slower")]
    #[inline]
    #[target_feature(enable = "avx2,fma,f16c")]
    unsafe fn add<const BITS: usize, const GROUP: usize>(&self, x: &Acts<'_>, token: usize, totals: &mut [__m256; R]) {
        let (groups, blocks, planes) = (x.cols / GROUP, Cut::<BITS, GROUP>::BLOCKS, Cut::<BITS, GROUP>::PLANES);
        // SAFETY: `fixed_point` checked every length that these pointers are moved within.
        unsafe {
            let from = token * groups + self.first;
            let x_scales = some::<F32>(x.fixed.scales.as_ptr().cast(), from, self.here);
            let sums = some::<F32>(x.sums.as_ptr().cast(), from, self.here);
            let mut scales = [Scales([0.0; CHUNK]); R];
            let mut all = *totals;
            for r in 0..R {
                scales[r] = Scales::new(_mm256_mul_ps(self.scales[r], x_scales));
                all[r] = _mm256_fmadd_ps(self.biases[r], sums, all[r]);
            }
            let mut xs: *const __m256i = x.fixed.bytes.as_ptr().add(token * Fixed::row_bytes(x.cols, BITS as u8) + self.start).cast();
            let mut wide = self.wide;
            for step in 0..Cut::<BITS, GROUP>::steps(self.here) {
                let mut dots = [_mm256_setzero_si256(); R];
                for _ in 0..blocks {
                    let x: [__m256i; PLANES_MAX] =
                        from_fn(|p| if p < planes { _mm256_loadu_si256(xs.add(p)) } else { _mm256_setzero_si256() });
                    for r in 0..R {
                        for p in 0..planes {
                            dots[r] = _mm256_add_epi32(dots[r], _mm256_madd_epi16(x[p], (*wide.add(p))[r]));
                        }
                    }
                    wide = wide.add(planes);
                    xs = xs.add(planes);
                }
                for r in 0..R {
                    let scale = scales[r].of(step, Cut::<BITS, GROUP>::SHARED);
                    all[r] = _mm256_fmadd_ps(scale, _mm256_cvtepi32_ps(dots[r]), all[r]);
                }
            }
            *totals = all;
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

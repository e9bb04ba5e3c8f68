//! The slab: equal slots for experts in memory that is reserved once and never moves. It does not know which slot holds
//! what; `cache/` decides, and its claims are the proof that an access is alone. Backends make one, loaders fill it.

#[cfg(target_os = "linux")]
#[path = "linux.rs"]
mod os;
#[cfg(not(target_os = "linux"))]
#[path = "macos.rs"]
mod os;
mod pages;

pub use pages::Pages;

use std::{io, ops::Range, ptr::NonNull};

use crate::{
    Error,
    cache::{Pin, Vacant},
    key::Slot,
};

/// Base alignment, and the size of a huge page.
const HUGE: usize = 2 << 20;

/// Slots of one destination, `stride` bytes apart.
#[derive(Clone, Copy, Debug)]
pub struct Region {
    pub base: NonNull<u8>,
    pub stride: usize,
}

/// Fixed equal slots; a slot has one part in each region.
#[derive(Debug)]
pub struct Slab {
    regions: Vec<Region>,
    slots: usize,
    /// Of a slab that owns its memory: what to unmap.
    mapping: Option<(NonNull<u8>, usize)>,
}

/// Where region 0 of a slot lies.
#[derive(Clone, Copy, Debug)]
pub struct SlotPtr {
    pub ptr: NonNull<u8>,
    pub len: usize,
}

// SAFETY: the memory belongs to no thread; all access goes through claims (one writer or many readers per slot) or
// through unsafe functions whose callers promise the same.
unsafe impl Send for Slab {}
// SAFETY: as above.
unsafe impl Sync for Slab {}
// SAFETY: an address and a length; reading through it is the unsafe step.
unsafe impl Send for SlotPtr {}
// SAFETY: as above.
unsafe impl Sync for SlotPtr {}

impl SlotPtr {
    /// The slot's bytes.
    ///
    /// # Safety
    /// For as long as the result lives, the slab exists and the slot is pinned: delivered by [`crate::Fetch::next`], not
    /// yet passed to [`crate::Fetch::done`], the fetch not dropped.
    pub unsafe fn bytes<'a>(self) -> &'a [u8] {
        // SAFETY: the caller's promise; a pinned slot is never written.
        unsafe { std::slice::from_raw_parts(self.ptr.as_ptr(), self.len) }
    }
}

impl Slab {
    /// One region of anonymous memory that takes no pages until slots are filled.
    pub fn anonymous(slot_bytes: usize, slots: usize) -> Result<Self, Error> {
        let fail = |bytes: usize, source| Error::Slab { bytes: bytes as u64, source };
        let invalid = || io::Error::new(io::ErrorKind::InvalidInput, "no slots, or more bytes than can be addressed");
        let stride = slot_bytes.checked_next_multiple_of(rustix::param::page_size()).unwrap_or(0);
        let (Some(len), true) = (stride.checked_mul(slots), stride > 0 && slots > 0 && u32::try_from(slots).is_ok()) else {
            return Err(fail(slot_bytes.saturating_mul(slots), invalid()));
        };
        let (mapping, mapped, base) = reserve(len, stride >= HUGE).map_err(|source| fail(len, source))?;
        Ok(Self { regions: vec![Region { base, stride }], slots, mapping: Some((mapping, mapped)) })
    }

    /// Slots in memory that a backend owns.
    ///
    /// # Safety
    /// Every region holds `slots × stride` initialised bytes that outlive the slab, do not overlap another region, and that
    /// nobody else writes; nobody reads a slot but while it is pinned.
    pub unsafe fn from_regions(regions: Vec<Region>, slots: usize) -> Self {
        Self { regions, slots, mapping: None }
    }

    pub fn slots(&self) -> usize {
        self.slots
    }

    /// Bytes that a slot takes in all regions together.
    pub fn stride_bytes(&self) -> usize {
        self.regions.iter().map(|region| region.stride).sum()
    }

    /// Bytes that a slot has in each region.
    pub(crate) fn strides(&self) -> impl Iterator<Item = usize> {
        self.regions.iter().map(|region| region.stride)
    }

    /// Where a slot's part in `region` begins.
    ///
    /// # Safety
    /// The slot and the region exist.
    pub unsafe fn slot_ptr(&self, slot: Slot, region: usize) -> *const u8 {
        // SAFETY: the caller's promise.
        unsafe { self.slot_mut(slot, region) }
    }

    /// The same, to write through.
    ///
    /// # Safety
    /// The slot and the region exist.
    pub(crate) unsafe fn slot_mut(&self, slot: Slot, region: usize) -> *mut u8 {
        debug_assert!(slot.index() < self.slots && region < self.regions.len());
        let Region { base, stride } = self.regions[region];
        // SAFETY: slot < slots, and the region is slots × stride bytes long.
        unsafe { base.as_ptr().add(slot.index() * stride) }
    }

    /// Region 0 of a slot.
    pub(crate) fn slot(&self, slot: Slot) -> SlotPtr {
        assert!(slot.index() < self.slots, "slot {} of {}", slot.0, self.slots);
        let Region { base, stride } = self.regions[0];
        // SAFETY: slot < slots, and the region is slots × stride bytes long.
        SlotPtr { ptr: unsafe { base.add(slot.index() * stride) }, len: stride }
    }

    /// Region 0 of a pinned slot.
    pub(crate) fn bytes<'a>(&'a self, pin: &'a Pin) -> &'a [u8] {
        // SAFETY: the core makes a Pin for a filled slot only and reuses the slot after the Pin is back only; the slab
        // is borrowed for as long as the result.
        unsafe { self.slot(pin.slot()).bytes() }
    }

    /// Gives a slot's pages back to the system; memory that a backend owns is left alone.
    pub(crate) fn discard(&self, vacant: &Vacant) {
        if self.mapping.is_some() {
            let SlotPtr { ptr, len } = self.slot(vacant.slot());
            // SAFETY: a page-aligned slot of our own mapping, and the claim says that nobody reads or writes it.
            unsafe { os::discard(ptr.as_ptr().cast(), len) }
        }
    }

    /// Faults in the pages of some slots, whatever they hold and whoever fills them meanwhile: contents stay.
    pub fn populate(&self, slots: Range<usize>) {
        if self.mapping.is_some() && !slots.is_empty() {
            assert!(slots.end <= self.slots, "slots {slots:?} of {}", self.slots);
            let Region { base, stride } = self.regions[0];
            // SAFETY: whole slots of our own mapping, which begin and end at pages.
            unsafe { os::populate(base.as_ptr().add(slots.start * stride).cast(), slots.len() * stride) }
        }
    }
}

impl Drop for Slab {
    fn drop(&mut self) {
        if let Some((start, len)) = self.mapping {
            // SAFETY: the whole mapping that `anonymous` made; readers borrow the slab, loaders hold it by Arc.
            unsafe { os::unmap(start.as_ptr().cast(), len) }
        }
    }
}

/// Address space for `len` bytes: the mapping, its length, and where in it the bytes begin, aligned for huge pages.
fn reserve(len: usize, huge: bool) -> io::Result<(NonNull<u8>, usize, NonNull<u8>)> {
    let too_much = || io::Error::new(io::ErrorKind::InvalidInput, "more bytes than can be addressed");
    let mapped = len.max(1).checked_add(HUGE).filter(|&len| isize::try_from(len).is_ok()).ok_or_else(too_much)?;
    let start = os::map(mapped)?.cast::<u8>();
    let mapping = NonNull::new(start).ok_or_else(too_much)?;
    let skip = start.align_offset(HUGE); // below HUGE, which `mapped` has to spare
    // SAFETY: `skip < HUGE`, so the pointer stays in the mapping, and `len` bytes follow it.
    let base = unsafe {
        let base = mapping.add(skip);
        os::advise(base.as_ptr().cast(), len, huge);
        base
    };
    Ok((mapping, mapped, base))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::{Arrival, Config, ExpertId, Experts, LayerId, PolicyKind, Read, Record, Routing, Slice, Source, Storage};

    #[test]
    fn slots_are_page_aligned_in_memory_aligned_for_huge_pages() {
        let page = rustix::param::page_size();
        let check = |bytes: usize, slots: usize, stride: usize| {
            let slab = Slab::anonymous(bytes, slots).unwrap();
            let base = slab.slot(Slot(0)).ptr.as_ptr() as usize;
            let last = slab.slot(Slot(slots as u32 - 1));
            assert_eq!((slab.slots(), slab.stride_bytes(), base % HUGE), (slots, stride, 0));
            assert_eq!((last.ptr.as_ptr() as usize - base, last.len), ((slots - 1) * stride, stride));
        };
        check(1, 1, page);
        check(page, 3, page);
        check(page + 1, 3, 2 * page);
        check(HUGE + 1, 64, HUGE + page);
    }

    #[test]
    fn impossible_sizes_are_errors() {
        for (bytes, slots) in [(0, 1), (1, 0), (usize::MAX, 1), (1 << 40, 1 << 30), (1, 1 << 33), (1 << 50, 1 << 8)] {
            assert!(matches!(Slab::anonymous(bytes, slots), Err(Error::Slab { .. })), "{slots} slots of {bytes}");
        }
    }

    /// Every byte of every file is 7.
    #[derive(Debug)]
    struct Sevens;

    impl Storage for Sevens {
        fn name(&self) -> &str {
            "sevens"
        }
        fn len(&self) -> u64 {
            1 << 30
        }
        fn read(&self, reads: &mut [Read<'_>]) -> io::Result<()> {
            reads.iter_mut().for_each(|read| read.into.fill(7));
            Ok(())
        }
    }

    fn open(slab: Slab, layers: usize, slots_per_layer: usize, slices: &[Slice]) -> Experts {
        let source = Source { files: vec![Box::new(Sevens)], layers: vec![vec![Record::unchecked(slices.to_vec()); 8]; layers] };
        Experts::open(source, slab, Config { top_k: 1, slots_per_layer, loaders: 2, policy: PolicyKind::Lfru }).unwrap()
    }

    #[test]
    fn a_backends_regions_are_filled_each_at_its_place() {
        let mut memory = [vec![0u8; 8 * 100], vec![0u8; 8 * 10]];
        let [a, b] = memory.each_mut().map(|bytes| NonNull::new(bytes.as_mut_ptr()).unwrap());
        // SAFETY: two vectors of 8 slots that outlive the slab and are looked at after it only.
        let slab = unsafe { Slab::from_regions(vec![Region { base: a, stride: 100 }, Region { base: b, stride: 10 }], 8) };
        let slice = |region: u8, at: u32, len: u32| Slice { file: 0, offset: u64::from(at), len, region, at };
        let mut experts = open(slab, 1, 3, &[slice(0, 2, 5), slice(1, 8, 2)]);
        assert_eq!(experts.slot_bytes(), 110);
        let mut fetch = experts.fetch(LayerId(0), &Routing::token(&[ExpertId(4)]));
        let mut arrivals = Vec::new();
        assert!(fetch.next(&mut arrivals));
        let [Arrival::Ready { slot, .. }] = arrivals[..] else { panic!("{arrivals:?}") };
        drop(fetch);
        experts.set_slots(1); // leaves foreign memory alone
        drop(experts);
        let sevens = memory.map(|bytes| bytes.iter().enumerate().filter(|(_, byte)| **byte == 7).map(|(i, _)| i).collect::<Vec<_>>());
        let at = |stride: usize, bytes: std::ops::Range<usize>| bytes.map(|byte| slot.index() * stride + byte).collect::<Vec<_>>();
        assert_eq!(sevens, [at(100, 2..7), at(10, 8..10)]);
    }

    /// How many pages of a slab's slots are in memory, from the kernel's page table.
    #[cfg(target_os = "linux")]
    fn present(experts: &Experts, slots: usize) -> usize {
        use std::os::unix::fs::FileExt;
        let (page, SlotPtr { ptr, len }) = (rustix::param::page_size(), experts.slot(Slot(0)));
        let mut entries = vec![0; slots * len / page * 8];
        let pagemap = std::fs::File::open("/proc/self/pagemap").unwrap();
        pagemap.read_exact_at(&mut entries, (ptr.as_ptr() as usize / page * 8) as u64).unwrap();
        entries.chunks(8).filter(|entry| entry[if cfg!(target_endian = "little") { 7 } else { 0 }] & 0x80 != 0).count()
    }

    #[cfg(target_os = "linux")]
    fn wait_present(experts: &Experts, slots: usize, expected: usize) {
        let deadline = std::time::Instant::now() + std::time::Duration::from_secs(60);
        while present(experts, slots) != expected {
            assert!(std::time::Instant::now() < deadline, "{} pages of {expected}", present(experts, slots));
            std::thread::yield_now();
        }
    }

    #[test]
    #[cfg(target_os = "linux")]
    fn pages_come_ahead_of_use_and_go_with_the_budget() {
        let page = rustix::param::page_size();
        let probe = Slab::anonymous(page, 1).unwrap();
        // SAFETY: the address of the slab's only page.
        let probed = unsafe { rustix::mm::madvise(probe.slot(Slot(0)).ptr.as_ptr().cast(), page, rustix::mm::Advice::LinuxPopulateWrite) };
        // A slot above the size of a huge page, and one below.
        for slot_pages in [HUGE / page + 3, 3] {
            let (layers, per_layer) = (2, slot_pages * 2);
            let slice = Slice { file: 0, offset: 0, len: (slot_pages * page) as u32, region: 0, at: 0 };
            let slab = Slab::anonymous(slot_pages * page, layers * 8).unwrap();
            let mut experts = open(slab, layers, 4, &[slice]);
            if probed.is_ok() {
                wait_present(&experts, 4 * layers, 4 * per_layer);
            }
            // Fill every slot, so that what goes is in use.
            for layer in [LayerId(0), LayerId(1)] {
                let ids = [0, 1, 2, 3].map(ExpertId);
                let mut fetch = experts.fetch(layer, &Routing::token(&ids));
                while fetch.next(&mut Vec::new()) {}
            }
            wait_present(&experts, 4 * layers, 4 * per_layer);
            experts.set_slots(1);
            assert_eq!(present(&experts, 4 * layers), per_layer, "given back before set_slots returns");
            assert_eq!(experts.stats().resident_bytes, 2 * experts.slot_bytes());
            experts.set_slots(3);
            if probed.is_ok() {
                wait_present(&experts, 4 * layers, 3 * per_layer);
            }
        }
    }
}

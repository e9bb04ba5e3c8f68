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

use std::{
    io,
    ops::Range,
    ptr::{self, NonNull},
    sync::atomic::{AtomicPtr, Ordering},
};

use crate::{
    Error,
    cache::{Hold, Pin, Vacant},
    key::{LayerId, Slot},
};

/// Base alignment, and the size of a huge page.
const HUGE: usize = 2 << 20;

/// Fixed equal slots.
#[derive(Debug)]
pub struct Slab {
    slots: usize,
    stride: usize,
    memory: Memory,
}

#[derive(Debug)]
enum Memory {
    /// Our own, slots in the order of their numbers: what to unmap, and where the first slot is.
    Mapped { start: NonNull<u8>, len: usize, base: NonNull<u8> },
    /// A backend's, a bank for each layer, which has no more slots than the budget: slot j × layers + l is the j-th of bank
    /// l. Replaced only while no loader is at work.
    Banks(Vec<AtomicPtr<u8>>),
}

/// Where a slot lies.
#[derive(Clone, Copy, Debug)]
pub struct SlotPtr {
    pub ptr: NonNull<u8>,
    pub len: usize,
}

/// Where a bank begins.
#[derive(Debug)]
pub struct BankPtr(NonNull<u8>);

impl BankPtr {
    /// # Safety
    /// As many initialised slots follow as were asked for. Nobody else writes them, and nobody reads one but while it is
    /// pinned, until the layer gets another bank or the experts are gone.
    pub unsafe fn new(first: NonNull<u8>) -> Self {
        Self(first)
    }
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
    /// Anonymous memory that takes no pages until slots are filled.
    pub fn anonymous(slot_bytes: usize, slots: usize) -> Result<Self, Error> {
        let fail = |bytes: usize, source| Error::Slab { bytes: bytes as u64, source };
        let invalid = || io::Error::new(io::ErrorKind::InvalidInput, "no slots, or more bytes than can be addressed");
        let stride = slot_bytes.checked_next_multiple_of(rustix::param::page_size()).unwrap_or(0);
        let (Some(len), true) = (stride.checked_mul(slots), stride > 0 && slots > 0 && u32::try_from(slots).is_ok()) else {
            return Err(fail(slot_bytes.saturating_mul(slots), invalid()));
        };
        let (mapping, mapped, base) = reserve(len).map_err(|source| fail(len, source))?;
        Ok(Self { slots, stride, memory: Memory::Mapped { start: mapping, len: mapped, base } })
    }

    /// Slots in memory that a backend owns, up to `places` in each layer. There is none until [`crate::Experts::set_banks`].
    pub fn banked(layers: usize, places: usize, stride: usize) -> Self {
        let banks = (0..layers).map(|_| AtomicPtr::new(ptr::null_mut())).collect();
        Self { slots: layers * places, stride, memory: Memory::Banks(banks) }
    }

    pub fn slots(&self) -> usize {
        self.slots
    }

    /// Bytes that a slot takes.
    pub fn stride_bytes(&self) -> usize {
        self.stride
    }

    /// Where a slot begins.
    pub(crate) fn slot_ptr(&self, slot: Slot) -> NonNull<u8> {
        assert!(slot.index() < self.slots, "slot {} of {}", slot.0, self.slots);
        let (base, number) = match &self.memory {
            Memory::Mapped { base, .. } => (*base, slot.index()),
            Memory::Banks(banks) => {
                // The order comes from the cache's lock, under which a loader gets its work.
                let bank = banks[slot.index() % banks.len()].load(Ordering::Relaxed);
                (NonNull::new(bank).expect("set_banks comes before the first fetch"), slot.index() / banks.len())
            }
        };
        // SAFETY: a slot of the mapping, or one that the cache has within the budget, which is what a bank has.
        unsafe { base.add(number * self.stride) }
    }

    pub(crate) fn slot(&self, slot: Slot) -> SlotPtr {
        SlotPtr { ptr: self.slot_ptr(slot), len: self.stride }
    }

    /// Gives a layer other memory, and copies to it the slots that stay: `(from, to)`, numbers within the layer. Loaders are
    /// held back and no slot of the layer is pinned.
    pub(crate) fn set_bank(&self, layer: LayerId, BankPtr(bank): BankPtr, stay: &[(usize, usize)]) {
        let Memory::Banks(banks) = &self.memory else { panic!("the slab has its own memory") };
        let old = banks[layer.index()].swap(bank.as_ptr(), Ordering::Relaxed);
        for &(from, to) in stay {
            // SAFETY: what stays was in the old bank and has a place in the new one, which is other memory.
            unsafe { ptr::copy_nonoverlapping(old.add(from * self.stride), bank.as_ptr().add(to * self.stride), self.stride) }
        }
    }

    /// A pinned slot.
    pub(crate) fn bytes<'a>(&'a self, pin: &'a Pin) -> &'a [u8] {
        // SAFETY: the core makes a Pin for a filled slot only and reuses the slot after the Pin is back only; the slab
        // is borrowed for as long as the result.
        unsafe { self.slot(pin.slot()).bytes() }
    }

    /// A slot that is held with all others, by its number among [layers, experts].
    pub(crate) fn held<'a>(&'a self, hold: &'a Hold<'_>, index: usize) -> Option<&'a [u8]> {
        // SAFETY: the core makes a Hold of filled slots only, and reuses none before what borrows the Hold is gone.
        hold.slot(index).map(|slot| unsafe { self.slot(slot).bytes() })
    }

    /// Gives a slot's pages back to the system; memory that a backend owns is left alone.
    pub(crate) fn discard(&self, vacant: &Vacant) {
        if let Memory::Mapped { base, .. } = self.memory {
            let SlotPtr { ptr, len } = self.slot(vacant.slot());
            // No huge page is to come back with its neighbours. A hole for each of many small slots would be more mappings than a process
            // may have: for all or for none, and until the slab is made anew.
            let (from, still) = if len < HUGE { (base, self.slots * len) } else { (ptr, len) };
            // SAFETY: a page-aligned slot of our own mapping, and the claim says that nobody reads or writes it; the advice changes
            // no contents.
            unsafe {
                os::advise(from.as_ptr().cast(), still, false);
                os::discard(ptr.as_ptr().cast(), len);
            }
        }
    }

    /// Faults in the pages of some slots, whatever they hold and whoever fills them meanwhile: contents stay.
    pub fn populate(&self, slots: Range<usize>) {
        if let (Memory::Mapped { base, .. }, false) = (&self.memory, slots.is_empty()) {
            assert!(slots.end <= self.slots, "slots {slots:?} of {}", self.slots);
            // SAFETY: whole slots of our own mapping, which begin and end at pages.
            unsafe { os::populate(base.as_ptr().add(slots.start * self.stride).cast(), slots.len() * self.stride) }
        }
    }
}

impl Drop for Slab {
    fn drop(&mut self) {
        if let Memory::Mapped { start, len, .. } = self.memory {
            // SAFETY: the whole mapping that `anonymous` made; readers borrow the slab, loaders hold it by Arc.
            unsafe { os::unmap(start.as_ptr().cast(), len) }
        }
    }
}

/// Address space for `len` bytes: the mapping, its length, and where in it the bytes begin, aligned for huge pages, of which they are
/// if they fill one.
fn reserve(len: usize) -> io::Result<(NonNull<u8>, usize, NonNull<u8>)> {
    let too_much = || io::Error::new(io::ErrorKind::InvalidInput, "more bytes than can be addressed");
    let mapped = len.max(1).checked_add(HUGE).filter(|&len| isize::try_from(len).is_ok()).ok_or_else(too_much)?;
    let start = os::map(mapped)?.cast::<u8>();
    let mapping = NonNull::new(start).ok_or_else(too_much)?;
    let skip = start.align_offset(HUGE); // below HUGE, which `mapped` has to spare
    // SAFETY: `skip < HUGE`, so the pointer stays in the mapping, and `len` bytes follow it.
    let base = unsafe {
        let base = mapping.add(skip);
        os::advise(base.as_ptr().cast(), len, len >= HUGE);
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
    #[cfg(target_os = "linux")]
    #[derive(Debug)]
    struct Sevens;

    #[cfg(target_os = "linux")]
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

    /// Byte i of every file is i / 16.
    #[derive(Debug)]
    struct Numbered;

    impl Storage for Numbered {
        fn name(&self) -> &str {
            "numbered"
        }
        fn len(&self) -> u64 {
            1 << 10
        }
        fn read(&self, reads: &mut [Read<'_>]) -> io::Result<()> {
            reads.iter_mut().for_each(|read| (read.offset..).zip(read.into.iter_mut()).for_each(|(i, byte)| *byte = (i / 16) as u8));
            Ok(())
        }
    }

    #[cfg(target_os = "linux")]
    fn open(slab: Slab, layers: usize, slots_per_layer: usize, slices: &[Slice]) -> Experts {
        let source = Source { files: vec![Box::new(Sevens)], layers: vec![vec![Record::unchecked(slices.to_vec()); 8]; layers] };
        Experts::open(source, slab, Config { top_k: 1, slots_per_layer, loaders: 2, policy: PolicyKind::Lfru }).unwrap()
    }

    #[test]
    fn banks_are_filled_replaced_and_keep_what_stays() {
        const STRIDE: usize = 8;
        // Expert e of a layer is at 16 × (layer × 4 + e), filled with its own offset / 16.
        let record = |record: u64| Record::unchecked(vec![Slice { file: 0, offset: 16 * record, len: STRIDE as u32, at: 0 }]);
        let layers = (0..2).map(|layer| (0..4).map(|expert| record(layer * 4 + expert)).collect()).collect();
        let source = Source { files: vec![Box::new(Numbered)], layers };
        let config = Config { top_k: 1, slots_per_layer: 1, loaders: 2, policy: PolicyKind::Lru };
        let mut banks: [Vec<u8>; 2] = Default::default();
        let mut experts = Experts::open(source, Slab::banked(2, 4, STRIDE), config).unwrap();
        let mut set = |experts: &mut Experts, slots: usize| {
            let make = |layer: LayerId, slots: usize, copy: &mut dyn FnMut(BankPtr)| {
                let mut new = vec![0; slots * STRIDE];
                // SAFETY: a vector of the right size, alive until it is replaced or the experts are gone.
                copy(unsafe { BankPtr::new(NonNull::new(new.as_mut_ptr()).unwrap()) });
                banks[layer.index()] = new; // the old one goes
                Ok::<_, ()>(())
            };
            experts.set_banks(slots, make).unwrap();
            assert_eq!((experts.slots(), experts.stats().slab_bytes), (slots, (2 * slots * STRIDE) as u64));
        };
        let check = |experts: &mut Experts, layer: u16, expert: u16, hit: bool| {
            let hits = experts.stats().hits;
            let mut fetch = experts.fetch(LayerId(layer), &Routing::token(&[ExpertId(expert)]));
            let mut arrivals = Vec::new();
            assert!(fetch.next(&mut arrivals));
            assert!(matches!(arrivals[..], [Arrival::Ready { .. }]), "{arrivals:?}");
            assert_eq!(fetch.bytes(ExpertId(expert)), [(layer * 4 + expert) as u8; STRIDE]);
            drop(fetch);
            assert_eq!(experts.stats().hits - hits, u64::from(hit), "layer {layer} expert {expert}");
        };
        set(&mut experts, 3);
        for expert in 0..3 {
            check(&mut experts, 0, expert, false);
            check(&mut experts, 1, expert, false);
        }
        set(&mut experts, 2); // the least recent goes
        check(&mut experts, 0, 2, true);
        check(&mut experts, 1, 1, true);
        check(&mut experts, 1, 0, false);
        set(&mut experts, 4);
        check(&mut experts, 0, 1, true);
        check(&mut experts, 0, 2, true);
        check(&mut experts, 0, 3, false);
        check(&mut experts, 0, 0, false);
        check(&mut experts, 1, 0, true);
        // Memory for one of two layers: what there is counts for nothing, and everything starts over.
        let one = |layer: LayerId, _: usize, _: &mut dyn FnMut(BankPtr)| if layer.0 == 0 { Ok(()) } else { Err(()) };
        experts.set_banks(3, one).unwrap_err();
        experts.clear();
        set(&mut experts, 4);
        check(&mut experts, 0, 0, false);
        check(&mut experts, 1, 0, false);
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
        let read = |path| std::fs::read_to_string(path).unwrap_or_default();
        // Huge pages of the mapping that an address lies in.
        let huge = |at: usize| {
            let smaps = read("/proc/self/smaps");
            let begin = |line: &str| usize::from_str_radix(line.split_once('-')?.0, 16).ok();
            let of = smaps.lines().rfind(|line| begin(line).is_some_and(|begin| begin <= at));
            let from = of.and_then(|line| smaps.find(line)).unwrap_or(0);
            smaps[from..].lines().find(|line| line.starts_with("AnonHugePages:")).is_some_and(|line| !line.contains(" 0 kB"))
        };
        let splits = || read("/proc/vmstat").lines().find_map(|line| line.strip_prefix("thp_split_page ")?.parse::<u64>().ok());
        // A slot above the size of a huge page, one below, and one in a slab that is smaller than it.
        for slot_pages in [HUGE / page + 3, HUGE / page / 2 - 3, 3] {
            let (layers, per_layer) = (2, slot_pages * 2);
            let slice = Slice { file: 0, offset: 0, len: (slot_pages * page) as u32, at: 0 };
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
            let (huge, before) = (huge(experts.slot(Slot(0)).ptr.as_ptr() as usize), splits());
            assert!(!huge || slot_pages > 3);
            experts.set_slots(1);
            assert_eq!(present(&experts, 4 * layers), per_layer, "given back before set_slots returns");
            assert!(!huge || splits() > before, "the kernel keeps huge pages whole");
            assert_eq!(experts.stats().resident_bytes, 2 * experts.slot_bytes());
            experts.set_slots(3);
            if probed.is_ok() {
                wait_present(&experts, 4 * layers, 3 * per_layer);
            }
        }
    }
}

//! macOS sensors: Mach host and task statistics and the kernel's own pressure level; no subprocess. Same function names
//! as `linux.rs`.

use std::{ffi::CStr, mem, ptr, thread, time::Duration};

use flash_engine::Bytes;
use mach2::{
    kern_return::KERN_SUCCESS,
    mach_init::mach_host_self,
    mach_port::mach_port_deallocate,
    message::mach_msg_type_number_t,
    port::mach_port_t,
    task::task_info,
    task_info::{TASK_VM_INFO, task_vm_info},
    traps::mach_task_self,
    vm_page_size::vm_page_size,
    vm_statistics::vm_statistics64,
    vm_types::integer_t,
};

use super::{
    Finding,
    budget::{Level, Readings},
};

/// Nothing to configure: the kernel is asked directly.
#[derive(Clone, Debug, Default)]
pub(crate) struct Sensors {}

impl Sensors {
    pub(crate) fn read(&self) -> Readings {
        let system = match sysctl::<i32>(c"kern.memorystatus_vm_pressure_level") {
            Some(2) => Level::Warn,
            Some(4) => Level::Critical,
            _ => Level::Normal,
        };
        let machine = available().zip(sysctl::<u64>(c"hw.memsize"));
        Readings { machine, system, process: self.process(), ..Readings::default() }
    }

    /// phys_footprint: what jetsam counts.
    pub(crate) fn process(&self) -> Option<Bytes> {
        let mut info = task_vm_info::default();
        let mut count = words::<task_vm_info>();
        // SAFETY: `info` holds `count` words, and the kernel writes at most that many.
        let result = unsafe { task_info(mach_task_self(), TASK_VM_INFO, ptr::from_mut(&mut info).cast(), &mut count) };
        (result == KERN_SUCCESS).then_some(info.phys_footprint)
    }

    /// What only macOS can be asked by Doctor.
    pub(crate) fn findings(&self) -> Vec<Finding> {
        vec![match self.read().system {
            Level::Normal => Finding::good("memory pressure", "normal".into()),
            level => Finding::bad("memory pressure", format!("{level:?}"), "close other applications or lower --expert-cache"),
        }]
    }
}

/// Never rings: the pressure level says it all.
#[derive(Debug, Default)]
pub(crate) struct Alarm {}

impl Alarm {
    pub(crate) fn rang(&mut self, _: &Sensors) -> bool {
        false
    }

    pub(crate) fn wait(&self, period: Duration) {
        thread::sleep(period);
    }
}

/// The compressor takes other pages first.
pub(crate) fn hold_code() {}

/// Free, speculative, purgeable and file-backed inactive pages: what can be had without the compressor.
fn available() -> Option<Bytes> {
    const HOST_VM_INFO64: i32 = 4;
    unsafe extern "C" {
        fn host_statistics64(host: mach_port_t, flavor: i32, info: *mut integer_t, count: *mut mach_msg_type_number_t) -> i32;
    }
    // SAFETY: plain integers, for which all zeros is a value.
    let mut info: vm_statistics64 = unsafe { mem::zeroed() };
    let mut count = words::<vm_statistics64>();
    // SAFETY: asks for a send right, which is given back below.
    let host = unsafe { mach_host_self() };
    // SAFETY: `info` holds `count` words, and the kernel writes at most that many.
    let result = unsafe { host_statistics64(host, HOST_VM_INFO64, ptr::from_mut(&mut info).cast(), &mut count) };
    // SAFETY: `host` is the right taken above, used no more. A failure leaks one reference, nothing else.
    unsafe { mach_port_deallocate(mach_task_self(), host) };
    // SAFETY: set by the system library before main and constant since.
    let page = unsafe { vm_page_size } as Bytes;
    // free_count includes the speculative pages; external pages that are active are in use.
    let pages =
        Bytes::from(info.free_count) + Bytes::from(info.purgeable_count) + Bytes::from(info.inactive_count.min(info.external_page_count));
    (result == KERN_SUCCESS).then_some(pages * page)
}

/// The size Mach calls count in.
fn words<T>() -> mach_msg_type_number_t {
    (size_of::<T>() / size_of::<integer_t>()) as mach_msg_type_number_t
}

fn sysctl<T: Default + Copy + Into<i128>>(name: &CStr) -> Option<T> {
    let mut value = T::default();
    let mut len = size_of::<T>();
    // SAFETY: `value` is an integer of `len` bytes, and the kernel writes at most `len`.
    let result = unsafe { libc::sysctlbyname(name.as_ptr(), ptr::from_mut(&mut value).cast(), &mut len, ptr::null_mut(), 0) };
    (result == 0 && len == size_of::<T>()).then_some(value)
}

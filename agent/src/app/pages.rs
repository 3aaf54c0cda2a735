//! The program's own pages. What is read and checked at the start is half of the program, and
//! not used again for long: its pages would count as the agent's memory for as long as there
//! is no shortage of it.

use std::{ffi::c_void, ptr::NonNull};

use nix::sys::mman::{MmapAdvise, madvise};

/// Unmaps the pages of the program's code and constants. They stay in the page cache, and
/// those that are needed are mapped again from there, as they are needed.
pub fn unmap_program() {
    // Safety: it is called with what `dl_iterate_phdr` promises.
    unsafe { libc::dl_iterate_phdr(Some(of_object), std::ptr::null_mut()) };
}

unsafe extern "C" fn of_object(
    object: *mut libc::dl_phdr_info,
    _size: libc::size_t,
    _data: *mut c_void,
) -> libc::c_int {
    // Safety: it is valid for as long as this runs, and so are its headers.
    let (object, headers) = unsafe {
        let object = &*object;
        let count = usize::from(object.dlpi_phnum);
        (object, std::slice::from_raw_parts(object.dlpi_phdr, count))
    };
    // Safety: it asks for a number.
    let page = unsafe { libc::sysconf(libc::_SC_PAGESIZE) } as usize;
    for header in headers {
        // What was ever writable may differ from the file.
        if header.p_type != libc::PT_LOAD || header.p_flags & libc::PF_W != 0 {
            continue;
        }
        let from = (object.dlpi_addr + header.p_vaddr) as usize;
        let to = (from + header.p_memsz as usize) / page * page;
        let from = from.next_multiple_of(page);
        if let Some(start) = NonNull::new(from as *mut c_void)
            && to > from
        {
            // Safety: the pages are the file's, and read from there again.
            let _they_stay = unsafe { madvise(start, to - from, MmapAdvise::MADV_DONTNEED) };
        }
    }
    // The first object is the program.
    1
}

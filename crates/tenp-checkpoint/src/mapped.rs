//! What a mapped file that another program makes shorter does to this process: a fault, told as an error with its name.

use std::ffi::c_int;
use std::os::unix::ffi::OsStrExt as _;
use std::path::Path;
use std::ptr::null_mut;
use std::sync::atomic::{AtomicPtr, AtomicUsize, Ordering};

/// More files than this at once are not named.
const PLACES: usize = 1024;

/// A mapped file, as a signal handler can look at it.
struct Place {
    /// 0 where the place is free.
    end: AtomicUsize,
    start: AtomicUsize,
    path: AtomicPtr<Vec<u8>>,
}

impl Place {
    /// Names never go, as a fault of another thread may be reading one: a few bytes for each file that is opened, none for
    /// one that is opened again.
    fn name(&self, name: &[u8]) {
        let old = self.path.load(Ordering::Relaxed);
        // SAFETY: a name is null or valid for ever.
        if unsafe { old.as_ref() }.is_none_or(|old| old != name) {
            let new = Box::leak(Box::new(name.to_vec()));
            self.path.store(new, Ordering::Relaxed);
        }
    }
}

static MAPPED: [Place; PLACES] = [const {
    Place {
        end: AtomicUsize::new(0),
        start: AtomicUsize::new(0),
        path: AtomicPtr::new(null_mut()),
    }
}; PLACES];

/// Keeps a mapped file's name known while it lives.
#[derive(Debug)]
pub(crate) struct Named(Option<usize>);

impl Named {
    pub(crate) fn new(map: &[u8], path: &Path) -> Self {
        let range = map.as_ptr_range();
        let (start, end) = (range.start.addr(), range.end.addr());
        let free = MAPPED.iter().position(|place| {
            let taken =
                place
                    .end
                    .compare_exchange(0, usize::MAX, Ordering::AcqRel, Ordering::Relaxed);
            taken.is_ok()
        });
        if let Some(index) = free {
            let place = &MAPPED[index];
            place.name(path.as_os_str().as_bytes());
            place.start.store(start, Ordering::Relaxed);
            place.end.store(end, Ordering::Release);
        }
        Self(free)
    }
}

impl Drop for Named {
    fn drop(&mut self) {
        if let Some(index) = self.0 {
            MAPPED[index].start.store(usize::MAX, Ordering::Relaxed);
            MAPPED[index].end.store(0, Ordering::Release);
        }
    }
}

/// From here on, a mapped file that becomes shorter ends the process with a message that names it and exit code 1, and a
/// file above the limit of file sizes is an error of its write; both would otherwise end the process by a signal.
/// For programs: a library leaves signals alone.
pub fn explain_faults() {
    // SAFETY: an all-zero `sigaction` is a valid value of this plain C struct; the handler has the signature that
    // SA_SIGINFO asks for and calls only what may be called in a handler; ignoring a signal has no preconditions.
    unsafe {
        let mut action: libc::sigaction = std::mem::zeroed();
        action.sa_sigaction = fault as extern "C" fn(_, _, _) as usize;
        action.sa_flags = libc::SA_SIGINFO | libc::SA_ONSTACK;
        libc::sigaction(libc::SIGBUS, &raw const action, null_mut());
        libc::signal(libc::SIGXFSZ, libc::SIG_IGN);
    }
}

extern "C" fn fault(_: c_int, info: *mut libc::siginfo_t, _: *mut libc::c_void) {
    // SAFETY: with SA_SIGINFO the system hands over a valid siginfo, whose address is set for SIGBUS.
    let address = unsafe { (*info).si_addr() }.addr();
    let inside = |place: &&Place| {
        let end = place.end.load(Ordering::Acquire);
        end != usize::MAX && (place.start.load(Ordering::Relaxed)..end).contains(&address)
    };
    let name = MAPPED
        .iter()
        .find(inside)
        .map(|place| place.path.load(Ordering::Relaxed));
    let name = match name {
        // SAFETY: a place with an end has a name, which is never freed.
        Some(name) => unsafe { &*name }.as_slice(),
        None => b"a mapped file",
    };
    for part in [
        b"tenp-run: ",
        name,
        b": cannot be read any more: it became shorter, or its disk failed; let no other program change it during a run, \
          then give the same command again\n",
    ] {
        // SAFETY: the slice is valid for reads of its length; `write` may be called in a handler.
        unsafe { libc::write(libc::STDERR_FILENO, part.as_ptr().cast(), part.len()) };
    }
    // SAFETY: ends the process at once, which may be done in a handler.
    unsafe { libc::_exit(1) }
}

//! What a launch can be found guilty of.

use std::ffi::CStr;
use std::fmt;
use std::path::Path;
use std::process::Command;

use crate::ffi::RawFault;

/// The kinds of [`Fault`].
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
#[non_exhaustive]
pub enum FaultKind {
    /// The launch itself: no such entry, a parameter struct of another size, limits of the device or of the entry.
    Launch,
    /// An access outside every buffer, shared memory's size, or a local array.
    OutOfBounds,
    /// A write to an input.
    ReadOnly,
    /// A read of bytes that nothing has written.
    Uninitialised,
    /// A read of bytes that a `cp.async` fills, before a wait.
    PendingCopy,
    /// Two accesses, one of them a write, that no synchronisation orders.
    Race,
    /// An access at an address that its size does not divide.
    Misaligned,
    /// Some threads wait at a `__syncthreads` that others do not reach.
    BarrierDivergence,
    /// Some lanes wait at a warp operation that others do not reach, or a shuffle reads a lane outside its mask.
    WarpDivergence,
    /// Arithmetic that C++ leaves undefined: overflow, shift, division by zero, conversion out of range.
    Undefined,
    /// A block does not end.
    StepLimit,
    /// An output has elements that nothing has written; from [`Buffer::written`](crate::Buffer::written).
    Unwritten,
}

impl FaultKind {
    const ALL: [Self; 12] = [
        Self::Launch,
        Self::OutOfBounds,
        Self::ReadOnly,
        Self::Uninitialised,
        Self::PendingCopy,
        Self::Race,
        Self::Misaligned,
        Self::BarrierDivergence,
        Self::WarpDivergence,
        Self::Undefined,
        Self::StepLimit,
        Self::Unwritten,
    ];
}

/// The first thing that went wrong in a launch, which ended there.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
pub struct Fault {
    /// What.
    pub kind: FaultKind,
    /// Name of the entry, or of the buffer for [`FaultKind::Unwritten`].
    pub kernel: String,
    /// Block.
    pub block: [u32; 3],
    /// Thread in the block, counted with x fastest; `None` where no one thread is at fault.
    pub thread: Option<u32>,
    /// The same in words, with what was accessed and who else is concerned.
    pub detail: String,
    /// Code offsets in the running program: the access at fault, then the one it collides with.
    pub places: Vec<u64>,
}

impl Fault {
    pub(crate) fn from_raw(kernel: &str, raw: &RawFault) -> Self {
        // SAFETY: the executor ends `detail` with a zero, within the array.
        let detail = unsafe { CStr::from_ptr(raw.detail.as_ptr()) };
        Self {
            kind: FaultKind::ALL[raw.kind as usize],
            kernel: kernel.to_string(),
            block: raw.block,
            thread: (raw.lane != u32::MAX).then_some(raw.lane),
            detail: detail.to_string_lossy().into_owned(),
            places: raw.places[..raw.num_places as usize].to_vec(),
        }
    }

    pub(crate) fn without_place(kind: FaultKind, kernel: &str, detail: String) -> Self {
        Self {
            kind,
            kernel: kernel.to_string(),
            block: [0; 3],
            thread: None,
            detail,
            places: Vec::new(),
        }
    }

    /// Source lines of [`places`](Self::places), innermost call first, as `addr2line` knows them.
    pub fn source_lines(&self) -> Vec<String> {
        self.places
            .iter()
            .map(|&place| source_line(place))
            .collect()
    }
}

impl fmt::Display for Fault {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let [x, y, z] = self.block;
        write!(f, "{}: {:?}: ", self.kernel, self.kind)?;
        match self.thread {
            Some(thread) => write!(f, "block ({x}, {y}, {z}), thread {thread}: ")?,
            None if self.places.is_empty() => {}
            None => write!(f, "block ({x}, {y}, {z}): ")?,
        }
        f.write_str(&self.detail)?;
        for (line, role) in self.source_lines().iter().zip(["at", "against"]) {
            write!(f, "\n    {role} {line}")?;
        }
        Ok(())
    }
}

/// `rms_norm.cu:31`, or the chain of inlined calls `reduce.cuh:12 < rms_norm.cu:31`.
fn source_line(place: u64) -> String {
    let unknown = || format!("code offset {place:#x}");
    let Ok(program) = std::env::current_exe() else {
        return unknown();
    };
    let output = Command::new("addr2line")
        .arg("-i")
        .arg("-e")
        .arg(program)
        .arg(format!("{place:#x}"))
        .output();
    let Ok(output) = output else {
        return unknown();
    };
    let text = String::from_utf8_lossy(&output.stdout);
    let names: Vec<&str> = text
        .lines()
        .filter(|line| !line.starts_with("??"))
        .filter_map(|line| Path::new(line.split(' ').next()?).file_name()?.to_str())
        .filter(|name| !name.starts_with("simt_"))
        .collect();
    if names.is_empty() {
        unknown()
    } else {
        names.join(" < ")
    }
}

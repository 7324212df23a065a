//! The executor as a place where a whole model runs: the kernels from their sources, dense products by plain loops.

use std::cell::Cell;

use bytemuck::Pod;
use tenp_kernels::KernelError;
use tenp_kernels::device::{
    Backend, Call, DenseElement, DenseShape, DeviceSlice, DeviceSliceMut, InputLayout, Memory,
    Runner, WeightLayout,
};

use crate::{Buffer, Executor, Fault, Schedule, ffi};

thread_local! {
    /// Launches of this thread.
    static LAUNCHES: Cell<u64> = const { Cell::new(0) };
}

/// A GPU of two multiprocessors that is no faster than the CPU it runs on, and checks everything.
#[derive(Clone, Copy, Debug)]
pub struct Simulated {
    /// Nothing: every launch another.
    schedule: Option<Schedule>,
    free_bytes: u64,
    wgmma: bool,
}

impl Simulated {
    /// With this schedule for every launch.
    pub fn new(schedule: Schedule) -> Self {
        Self {
            schedule: Some(schedule),
            free_bytes: 1 << 30,
            wgmma: false,
        }
    }

    /// With another random schedule for every launch of a thread, and another number of multiprocessors: what depends on either
    /// comes out otherwise when it is done again.
    pub fn never_alike() -> Self {
        Self {
            schedule: None,
            ..Self::new(Schedule::Forward)
        }
    }

    /// The same GPU with the instructions of sm_90.
    #[must_use]
    pub fn with_wgmma(self) -> Self {
        Self {
            wgmma: true,
            ..self
        }
    }

    /// The same GPU, which says that so many bytes are free.
    #[must_use]
    pub fn with_free_bytes(self, free_bytes: u64) -> Self {
        Self { free_bytes, ..self }
    }
}

/// The fault in the words of the kernels' crate.
fn failed(what: &'static str, fault: &Fault) -> KernelError {
    KernelError::Cuda {
        what,
        code: "simulated".into(),
        text: fault.to_string(),
    }
}

fn check_host_access(address: u64, bytes: usize, writes: bool) -> Result<(), KernelError> {
    if bytes == 0 {
        return Ok(());
    }
    // SAFETY: asks about an address, and marks bytes of a live buffer of this thread as written.
    let answer = unsafe { ffi::simt_host_access(address, bytes as u64, u32::from(writes)) };
    let text = match answer {
        0 => return Ok(()),
        1 => "no buffer holds these bytes",
        _ => "bytes that nothing has written are read",
    };
    Err(KernelError::Cuda {
        what: "copy between the host and simulated memory",
        code: "simulated".into(),
        text: format!("{bytes} bytes at {address:#x}: {text}"),
    })
}

fn check_len(what: &'static str, expected: usize, got: usize) -> Result<(), KernelError> {
    if expected == got {
        return Ok(());
    }
    Err(KernelError::Length {
        what,
        expected,
        got,
    })
}

/// The elements of a view, to read.
fn elements<T: Pod>(view: DeviceSlice<'_, T>) -> Result<&[T], KernelError> {
    check_host_access(view.address(), view.len() * size_of::<T>(), false)?;
    if view.is_empty() {
        return Ok(&[]);
    }
    // SAFETY: a buffer of this thread holds all of them, written; views are made for aligned elements of live buffers.
    Ok(unsafe { std::slice::from_raw_parts(view.address() as *const T, view.len()) })
}

/// The elements of a view, to write all of.
fn elements_mut<T: Pod>(mut view: DeviceSliceMut<'_, T>) -> Result<&mut [T], KernelError> {
    let view = view.reborrow();
    check_host_access(view.address(), view.len() * size_of::<T>(), true)?;
    if view.is_empty() {
        return Ok(&mut []);
    }
    // SAFETY: a buffer of this thread holds all of them, and the view borrows them alone.
    Ok(unsafe { std::slice::from_raw_parts_mut(view.address() as *mut T, view.len()) })
}

impl<T: Pod> Memory<T> for Buffer<T> {
    fn view(&self) -> DeviceSlice<'_, T> {
        // SAFETY: the buffer's own memory, borrowed for as long as the view.
        unsafe { DeviceSlice::from_raw(self.ptr() as u64, self.len()) }
    }

    fn view_mut(&mut self) -> DeviceSliceMut<'_, T> {
        // SAFETY: the buffer's own memory, borrowed alone for as long as the view.
        unsafe { DeviceSliceMut::from_raw(self.mut_ptr() as u64, self.len()) }
    }
}

impl Runner for Simulated {
    type Error = KernelError;

    fn multiprocessors(&self) -> usize {
        match self.schedule {
            Some(_) => 2,
            // Scrambled (by 2^64 over the golden ratio): a check's launches come in a rhythm of their own.
            None => 1 + (LAUNCHES.get().wrapping_mul(0x9e37_79b9_7f4a_7c15) >> 61) as usize,
        }
    }

    fn has_wgmma(&self) -> bool {
        self.wgmma
    }

    fn run(&self, call: &Call<'_>) -> Result<(), KernelError> {
        let launch = call.launch();
        if launch.is_empty() {
            return Ok(());
        }
        LAUNCHES.set(LAUNCHES.get() + 1);
        let schedule = self.schedule.unwrap_or(Schedule::Random(LAUNCHES.get()));
        let done = Executor::new(schedule).launch_call(call);
        done.map(|_| ())
            .map_err(|fault| failed(call.entry(), &fault))
    }
}

/// An upload that has not arrived: the bytes get there when it is waited for, and no sooner.
pub struct Transfer {
    from: Vec<u8>,
    into: Buffer<u8>,
    len: usize,
}

impl Backend for Simulated {
    type Buffer<T: Pod> = Buffer<T>;
    type Idle = Buffer<u8>;
    type Staging = Vec<u8>;
    type Transfer = Transfer;

    fn alloc<T: Pod>(&self, what: &'static str, len: usize) -> Result<Buffer<T>, KernelError> {
        Ok(Buffer::output(what, len))
    }

    fn clear<T: Pod>(&self, to: DeviceSliceMut<'_, T>) -> Result<(), KernelError> {
        elements_mut(to)?.fill(T::zeroed());
        Ok(())
    }

    fn write<T: Pod>(&self, to: DeviceSliceMut<'_, T>, values: &[T]) -> Result<(), KernelError> {
        check_len("copy to the GPU", to.len(), values.len())?;
        elements_mut(to)?.copy_from_slice(values);
        Ok(())
    }

    fn read<T: Pod>(&self, from: DeviceSlice<'_, T>, out: &mut [T]) -> Result<(), KernelError> {
        check_len("copy from the GPU", from.len(), out.len())?;
        out.copy_from_slice(elements(from)?);
        Ok(())
    }

    fn copy<T: Pod>(
        &self,
        from: DeviceSlice<'_, T>,
        to: DeviceSliceMut<'_, T>,
    ) -> Result<(), KernelError> {
        check_len("copy on the GPU", to.len(), from.len())?;
        elements_mut(to)?.copy_from_slice(elements(from)?);
        Ok(())
    }

    fn dense<I: DenseElement, O: DenseElement>(
        &self,
        shape: &DenseShape,
        x: DeviceSlice<'_, I>,
        weight: DeviceSlice<'_, I>,
        out: DeviceSliceMut<'_, O>,
    ) -> Result<(), KernelError> {
        let [x_len, weight_len, out_len] = shape.extents()?;
        // Row by row, since nothing need be written between the rows.
        let weight = elements(weight.slice(0..weight_len)?)?;
        let mut out = out.slice(0..out_len)?;
        let x = x.slice(0..x_len)?;
        let at = |inner: usize, output: usize| match shape.layout {
            WeightLayout::OutputRows => weight[output * shape.weight_pitch + inner].to_f32(),
            WeightLayout::InnerRows => weight[inner * shape.weight_pitch + output].to_f32(),
        };
        for r in 0..shape.rows {
            let row = match shape.x_layout {
                InputLayout::Rows => {
                    elements(x.slice(r * shape.x_pitch..r * shape.x_pitch + shape.inner)?)?.to_vec()
                }
                InputLayout::InnerRows => (0..shape.inner)
                    .map(|i| {
                        let at = i * shape.x_pitch + r;
                        Ok(elements(x.slice(at..at + 1)?)?[0])
                    })
                    .collect::<Result<_, KernelError>>()?,
            };
            let start = r * shape.out_pitch;
            let part = out.reborrow().slice(start..start + shape.outputs)?;
            if shape.accumulate {
                elements(part.as_slice())?;
            }
            for (o, value) in elements_mut(part)?.iter_mut().enumerate() {
                let mut sum = if shape.accumulate {
                    value.to_f32()
                } else {
                    0.0
                };
                for (i, x) in row.iter().enumerate() {
                    sum = x.to_f32().mul_add(at(i, o), sum);
                }
                *value = O::from_f32(sum);
            }
        }
        Ok(())
    }

    fn free_bytes(&self) -> Result<u64, KernelError> {
        Ok(self.free_bytes)
    }

    fn staging(&self, bytes: usize) -> Result<Vec<u8>, KernelError> {
        Ok(vec![0; bytes])
    }

    fn staging_bytes(staging: &mut Vec<u8>) -> Result<&mut [u8], KernelError> {
        Ok(staging)
    }

    fn idle(&self, buffer: Buffer<u8>) -> Result<Buffer<u8>, KernelError> {
        Ok(buffer)
    }

    fn start_transfer(
        &self,
        from: Vec<u8>,
        into: Buffer<u8>,
        len: usize,
    ) -> Result<Transfer, KernelError> {
        check_len("upload", len, len.min(from.len()).min(into.len()))?;
        Ok(Transfer { from, into, len })
    }

    fn finish_transfer(
        &self,
        mut transfer: Transfer,
    ) -> Result<(Vec<u8>, Buffer<u8>), KernelError> {
        let part = transfer.into.view_mut().slice(0..transfer.len)?;
        self.write(part, &transfer.from[..transfer.len])?;
        Ok((transfer.from, transfer.into))
    }
}

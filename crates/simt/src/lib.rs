//! Runs the CUDA kernel sources on the CPU, thread by thread, and finds what a GPU would hide.
//!
//! `build.rs` compiles every `kernels/cuda/*.cu` with g++ as C++20, with all loads and stores instrumented; here they are
//! launched by name. One thread of the device is one fiber, the blocks of a launch run one after another.
//!
//! # A test of a kernel
//! ```no_run
//! use simt::{Buffer, Executor, Schedule};
//!
//! // The same layout as the entry's struct in params.h; for the kernels of this project, `tenp_kernels::params` has it.
//! #[repr(C)]
//! #[derive(Clone, Copy)]
//! struct ScaleParams {
//!     x: *const f32,
//!     out: *mut f32,
//!     count: i32,
//!     factor: f32,
//! }
//!
//! let values = [1.0, 2.0, 3.0];
//! for schedule in Schedule::UNLIKE {
//!     let x = Buffer::input("x", &values); // a write to it is a fault
//!     let out = Buffer::<f32>::output("out", 3); // poisoned; reading it before a kernel wrote it is a fault
//!     let params = ScaleParams { x: x.ptr(), out: out.mut_ptr(), count: 3, factor: 2.0 };
//!     // entry, grid, block, bytes of shared memory, parameters
//!     Executor::new(schedule).launch("tenp_scale", [1, 1, 1], [32, 1, 1], 0, &params)?;
//!     // All elements, or a fault that lists those no thread wrote. `to_vec` and `unwritten` do not insist.
//!     assert_eq!(out.written()?, [2.0, 4.0, 6.0]);
//! }
//! # Ok::<(), simt::Fault>(())
//! ```
//! `{fault}` prints the kernel, block, thread, what was done to which element of which buffer, and the source lines of
//! both accesses. Buffers may be used by several launches, one after another, on the thread that made them.
//!
//! # What is checked
//! | [`FaultKind`] | found when |
//! |---|---|
//! | `OutOfBounds` | any access outside the named buffers and the launch's shared bytes; constant-size local arrays too |
//! | `ReadOnly` | a write to a [`Buffer::input`] |
//! | `Uninitialised` | a read of a byte that nothing wrote: shared memory since the block began, an output since it was made |
//! | `PendingCopy` | a read of what a `cp.async` fills, before its own thread's wait for that group, or a bulk copy, before the end of its mbarrier's phase; a block that ends with a bulk copy or a `wgmma` under way |
//! | `Race` | two accesses to a byte, one a write, unordered: blocks of a launch are never ordered; threads of a block are by `__syncthreads`, lanes of a warp also by `__syncwarp`, but not by shuffles, votes, ldmatrix or mma; a `cp.async` writes at any time from issue to wait; mbarriers and barriers of some threads order what their arrivals and waits order; a write to what a `wgmma` or a bulk store still reads; memory written by ordinary stores and read by `wgmma` or a bulk copy with no `fence.proxy.async` of the writer; equal values do not excuse two writes; atomics race with plain accesses only |
//! | `Misaligned` | any access whose address its type's alignment does not divide; 16 bytes for `cp.async`, `ldmatrix` rows, `load_streaming` |
//! | `BarrierDivergence` | a `__syncthreads` that some thread never reaches, because it has exited or stands at another one; likewise mbarriers, `bar.sync` of some threads and `setmaxnreg` |
//! | `WarpDivergence` | likewise for `__syncwarp`, shuffles, votes, ldmatrix, mma (all 32 lanes), wgmma (all 128); a shuffle from a lane outside the mask |
//! | `Undefined` | signed overflow, shifts too far, integer division by zero, a float an integer cannot hold; tensor maps, mbarriers and accumulators used against their rules |
//! | `StepLimit` | a block of more than 2³⁰ steps, or a second of processor time without one: no launch hangs |
//! | `Launch` | an unknown entry, parameters of another size, limits of sm_90, launch bounds of the entry |
//! | `Unwritten` | [`Buffer::written`] and elements that no thread wrote |
//!
//! Lanes meet at a warp operation only if they stand at the same source line with the same mask. In a last warp of fewer
//! than 32 lanes a mask must not name the missing ones.
//!
//! # What is adversarial
//! Copies arrive when a wait asks for them and no sooner, and read their source then; until then the destination is
//! poison. Bulk copies arrive when no thread can go on without one (sooner, by chance, under a random order);
//! accumulators of `wgmma` are NaN until they have been waited for. Shared memory and outputs start as 0xff bytes (NaN), local variables as 0xfe. [`Schedule`] decides who runs
//! next: let every test go through [`Schedule::UNLIKE`].
//!
//! # What is not checked
//! Speed, registers, bank conflicts; what nvcc makes of the source; writes of two blocks that the kernel orders by
//! itself (spinning, last block done), which are reported as races. Sums of `mma` run over k in order, in f32: tensor cores
//! differ in the last bits. `fast_exp`, `fast_exp2` and `rsqrtf` are exact to f32 rounding here, approximations on the device.
//!
//! # Where things are
//! `src-cpp/include` is what kernel sources see instead of CUDA's headers and inline PTX; beside it `engine*.cpp` (launch,
//! schedule, barriers), `warp.cpp`, `async.cpp`, `matrix.cpp` (the instructions), `shadow.cpp` (races), `memory.cpp`
//! (buffers), `hooks.cpp` (what the instrumentation calls), `fiber.cpp`; sm_90 in `part_barriers.cpp` (mbarriers, vector
//! clocks), `bulk.cpp` (tensor maps and their copies), `wgmma.cpp` (products, register pools). `build/planted.rs` lists the
//! mistakes planted into the kernels.

pub mod backend;
pub mod buffer;
pub mod executor;
pub mod fault;
mod ffi;
pub mod tensor_map;

pub use backend::Simulated;
pub use buffer::{Buffer, Held, most_held};
pub use executor::{Executor, Report, Schedule, entries, launch};
pub use fault::{Fault, FaultKind};

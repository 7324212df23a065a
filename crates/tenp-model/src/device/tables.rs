//! What the kernels must know of the sequences, uploaded once per pass.

use std::ops::Range;

use tenp_kernels::KernelError;
use tenp_kernels::cpu::rotary::RotaryTable;
use tenp_kernels::device::rotary::Angles;
use tenp_kernels::device::{Backend, DeviceSlice, Memory};

use super::uploaded;
use crate::Sequences;

/// Where a block's integers begin in the table of all blocks.
struct BlockPlace {
    first: usize,
    num_sequences: usize,
    num_tokens: usize,
    longest_query: usize,
    longest_keys: usize,
    has_prefixes: bool,
}

/// Integers of every block, and the rotary angles.
pub(super) struct Tables<B: Backend> {
    integers: B::Buffer<i32>,
    places: Vec<BlockPlace>,
    cosines: B::Buffer<f32>,
    sines: B::Buffer<f32>,
    num_positions: usize,
    num_pairs: usize,
    interleaved: bool,
    leading: bool,
    cached: bool,
}

/// What attention must know of a block's sequences.
#[derive(Clone, Copy)]
pub(super) struct BlockTables<'a> {
    pub(super) num_sequences: usize,
    pub(super) num_tokens: usize,
    /// Queries of the longest sequence.
    pub(super) longest_query: usize,
    /// Keys of the longest sequence.
    pub(super) longest_keys: usize,
    /// `[num_tokens]`.
    pub(super) positions: DeviceSlice<'a, i32>,
    /// `[num_sequences + 1]`.
    pub(super) query_offsets: DeviceSlice<'a, i32>,
    /// `[num_sequences]` first rows and lengths of the stems, where any sequence has one.
    pub(super) prefixes: Option<(DeviceSlice<'a, i32>, DeviceSlice<'a, i32>)>,
    /// `[num_sequences]`: first row of each sequence's keys, in the block or in the cache.
    pub(super) key_rows: DeviceSlice<'a, i32>,
    /// `[num_sequences]`: keys behind the stem's.
    pub(super) key_lens: DeviceSlice<'a, i32>,
    /// `[num_tokens]`: row of each token's key in the cache, where there is one.
    pub(super) cache_rows: Option<DeviceSlice<'a, i32>>,
}

impl<B: Backend> Tables<B> {
    /// `cache_rows` is the number of rows that each sequence has in the cache, where there is one.
    pub(super) fn new(
        backend: &B,
        sequences: &Sequences,
        blocks: &[Range<usize>],
        rotary: &RotaryTable,
        cache_rows: Option<usize>,
    ) -> Result<Self, KernelError> {
        let positions = sequences.positions();
        let mut integers: Vec<i32> = Vec::new();
        let mut places = Vec::with_capacity(blocks.len());
        for block in blocks {
            let rows = sequences.rows(block);
            let spans = &sequences.spans()[block.clone()];
            let local = |row: usize| (row - rows.start) as i32;
            let stem = |span: &crate::sequences::Span| {
                span.parent.map(|p| sequences.spans()[p].rows.clone())
            };
            places.push(BlockPlace {
                first: integers.len(),
                num_sequences: spans.len(),
                num_tokens: rows.len(),
                longest_query: spans.iter().map(|s| s.rows.len()).max().unwrap_or(0),
                longest_keys: spans
                    .iter()
                    .map(|s| s.first_position + s.rows.len())
                    .max()
                    .unwrap_or(0),
                has_prefixes: spans.iter().any(|s| s.parent.is_some()),
            });
            integers.extend(positions[rows.clone()].iter().map(|&p| p as i32));
            integers.push(0);
            integers.extend(spans.iter().map(|s| local(s.rows.end)));
            integers.extend(spans.iter().map(|s| stem(s).map_or(0, |r| local(r.start))));
            integers.extend(spans.iter().map(|s| stem(s).map_or(0, |r| r.len() as i32)));
            match cache_rows {
                None => {
                    integers.extend(spans.iter().map(|s| local(s.rows.start)));
                    integers.extend(spans.iter().map(|s| s.rows.len() as i32));
                }
                // A sequence's keys are those of all its positions so far.
                Some(room) => {
                    let first = |s: usize| ((block.start + s) * room) as i32;
                    integers.extend((0..spans.len()).map(first));
                    let lens = spans.iter().map(|s| s.first_position + s.rows.len());
                    integers.extend(lens.map(|len| len as i32));
                    for (s, span) in spans.iter().enumerate() {
                        let start = first(s) + span.first_position as i32;
                        integers.extend((0..span.rows.len() as i32).map(|i| start + i));
                    }
                }
            }
        }
        Ok(Self {
            integers: uploaded(backend, "tables of sequences", &integers)?,
            places,
            num_positions: rotary.positions(),
            num_pairs: rotary.pairs(),
            interleaved: rotary.is_interleaved(),
            leading: rotary.is_leading(),
            cosines: uploaded(backend, "rotary table", rotary.cosines())?,
            sines: uploaded(backend, "rotary table", rotary.sines())?,
            cached: cache_rows.is_some(),
        })
    }

    /// The rotary angles.
    pub(super) fn angles(&self) -> Angles<'_> {
        Angles {
            cosines: self.cosines.view(),
            sines: self.sines.view(),
            positions: self.num_positions,
            pairs: self.num_pairs,
            interleaved: self.interleaved,
            leading: self.leading,
        }
    }

    /// The tables of block `index`.
    pub(super) fn block(&self, index: usize) -> Result<BlockTables<'_>, KernelError> {
        let place = &self.places[index];
        let (sequences, tokens) = (place.num_sequences, place.num_tokens);
        let mut start = place.first;
        let mut next = |len: usize| {
            let part = self.integers.view().slice(start..start + len);
            start += len;
            part
        };
        let positions = next(tokens)?;
        let query_offsets = next(sequences + 1)?;
        let prefixes = (next(sequences)?, next(sequences)?);
        Ok(BlockTables {
            num_sequences: sequences,
            num_tokens: tokens,
            longest_query: place.longest_query,
            longest_keys: place.longest_keys,
            positions,
            query_offsets,
            prefixes: place.has_prefixes.then_some(prefixes),
            key_rows: next(sequences)?,
            key_lens: next(sequences)?,
            cache_rows: self.cached.then(|| next(tokens)).transpose()?,
        })
    }
}

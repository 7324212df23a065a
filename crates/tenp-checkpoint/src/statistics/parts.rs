//! One layer's statistics in a file of its own, while a calibration goes on: those of the domains and those of their groups.

use std::collections::BTreeMap;
use std::path::Path;

use super::file::{StatisticsFile, plan_layer, write_layer};
use super::{Folds, LayerStatistics, Statistics};
use crate::CheckpointError;
use crate::atomic::replace_file;
use crate::header::{self, PlannedTensor};
use crate::shard::Shard;

/// Names what `{number}/{domain}` is: the domain's own sums are group 0.
fn name(domain: &str, group: usize) -> String {
    format!("{group}/{domain}")
}

/// Writes a layer of all domains and groups, the file as a whole or not at all.
///
/// # Errors
/// A statistic of the wrong length, or the file cannot be written.
pub fn write_parts(
    path: &Path,
    layer: usize,
    statistics: &Statistics,
    folds: &Folds,
) -> Result<(), CheckpointError> {
    let mut parts: Vec<(String, &LayerStatistics)> = Vec::new();
    for (domain, layers) in &statistics.domains {
        parts.extend(layers.get(&layer).map(|sums| (name(domain, 0), sums)));
    }
    for (domain, groups) in folds {
        for (group, layers) in groups.iter().enumerate() {
            let sums = layers.get(&layer);
            parts.extend(sums.map(|sums| (name(domain, group + 1), sums)));
        }
    }
    let mut planned = Vec::new();
    for (name, sums) in &parts {
        plan_layer(&mut planned, name, layer, sums, false)?;
    }
    let refs: Vec<&PlannedTensor> = planned.iter().collect();
    let header = header::build(&BTreeMap::new(), &refs);
    let data: u64 = planned.iter().map(PlannedTensor::num_bytes).sum();
    replace_file(path, header.len() as u64 + data, |sink| {
        sink.write(&header)?;
        parts
            .iter()
            .try_for_each(|(_, sums)| write_layer(sink, sums))
    })
}

/// Reads a layer back into the domains and groups that are there, of the domains without the `[N,K]` tables that are not
/// `wanted`.
///
/// # Errors
/// A damaged file.
pub fn read_parts(
    path: &Path,
    layer: usize,
    statistics: &mut Statistics,
    folds: &mut Folds,
    wanted: &dyn Fn(&str) -> bool,
) -> Result<(), CheckpointError> {
    let shard = Shard::open_file(path.to_path_buf(), "statistics")?;
    for (domain, layers) in &mut statistics.domains {
        layers.insert(layer, read(&shard, &name(domain, 0), layer, wanted)?);
    }
    for (domain, groups) in folds {
        for (group, layers) in groups.iter_mut().enumerate() {
            let sums = read(&shard, &name(domain, group + 1), layer, &|_| true)?;
            layers.insert(layer, sums);
        }
    }
    Ok(())
}

/// Reads a layer of a domain back, whole.
pub(super) fn read_domain(
    path: &Path,
    domain: &str,
    layer: usize,
) -> Result<LayerStatistics, CheckpointError> {
    let shard = Shard::open_file(path.to_path_buf(), "statistics")?;
    read(&shard, &name(domain, 0), layer, &|_| true)
}

fn read(
    shard: &Shard,
    name: &str,
    layer: usize,
    wanted: &dyn Fn(&str) -> bool,
) -> Result<LayerStatistics, CheckpointError> {
    let release = |range| shard.release(range);
    let file = StatisticsFile {
        path: &shard.path,
        entries: &shard.entries,
        metadata: &shard.metadata,
        bytes: shard.slice(0..shard.num_bytes() as usize),
        release: &release,
        wanted,
        partial: true,
    };
    file.layer(&file.by_name(), &format!("{name}/layers.{layer}"))
}

//! `compare`: every method at every budget, on the same calibration draws, with tables, plots and a page.

mod cell;
mod grid;
mod results;
mod tables;

use std::path::Path;
use std::time::Instant;

use anyhow::{Context, Result};
use tenp_checkpoint::{ApplyOptions, Checkpoint, CheckpointError, output_bytes};
use tenp_model::Model;
use tenp_model::calibrate::FoldOptions;
use tenp_model::memory::StatisticsMemory;
use tenp_model::text::Task;

use super::eval;
use crate::cli::{Compare, HiddenArgs, RecoverArg};
use crate::failure::{UsageError, usage};
use crate::forecast::{Forecast, Measuring, Pruned, Sizes};
use crate::models::Domains;
use crate::place::Place;
use crate::search::{self, Search};
use crate::{console, models, recovery, requests};

use cell::{Bench, Cell};
use grid::Grid;

/// In the folder of results: what they were measured with.
const INPUTS: &str = "inputs.json";

pub(super) fn run(args: &Compare) -> Result<()> {
    if args.tasks.is_empty() && args.text.is_empty() {
        return Err(usage("nothing to measure: give --tasks, --text or both"));
    }
    let checkpoint = models::open(&args.model)?;
    if let Some(original) = checkpoint.pruned_from() {
        let dir = args.model.display();
        return Err(usage(format!(
            "{dir} is already pruned (from {original}); compare on the original checkpoint"
        )));
    }
    check_output(&args.output, &args.model)?;
    let texts = models::Texts::new(&checkpoint);
    let grid = Grid::new(args, &checkpoint)?;
    let draws = texts.draws(&args.data, args.seeds)?;
    for key in grid.cells(0) {
        search::check(&key.request()?.0, &draws[0])?;
    }
    let (tasks, samples) = (
        texts.tasks(&args.tasks)?,
        texts.texts("--text", &args.text, args.data.seq_len)?,
    );
    let place = Place::new(args.run)?;
    let spill = HiddenArgs::default().spill(&args.output.join("model"));
    if args.dry_run {
        return place.with_model(&checkpoint, |model| {
            let model = model.spilling(&spill);
            dry_run(args, &model, &grid, &draws, (&tasks, &samples))
        });
    }
    let measured = place.with_model(&checkpoint, |model| {
        let bench = Bench {
            checkpoint: &checkpoint,
            model: model.spilling(&spill),
            place: &place,
            tasks,
            texts: samples,
            folder: &args.output,
            spill: &spill,
            min_tokens: args.data.min_tokens,
            every: args.keep_work.every(),
        };
        prepare(args, &checkpoint, &bench, &draws)?;
        let full = bench.full()?;
        let cells = run_cells(&bench, &grid, &draws)?;
        Ok(results::Results::new(&checkpoint, full, cells))
    });
    let unchanged = checkpoint.check_unchanged().map_err(anyhow::Error::from);
    let measured = unchanged.and(measured);
    let results = measured.map_err(|error| unfinished(error, &args.output))?;
    results.write(&args.output)?;
    if args.json {
        console::json(&results.json());
    } else {
        console::data(&results.text());
    }
    console::note(&format!(
        "wrote {}",
        args.output.join("index.html").display()
    ));
    Ok(())
}

/// Adds to an error how to go on. A refused output says itself what helps.
fn unfinished(error: anyhow::Error, output: &Path) -> anyhow::Error {
    let refused = matches!(error.downcast_ref(), Some(CheckpointError::Output { .. }));
    if refused || error.is::<UsageError>() || !output.join(INPUTS).exists() {
        return error;
    }
    error.context(format!(
        "{} is unfinished (the same command goes on with the cells and the calibration that it has; delete it if the model is \
         to be another now)",
        output.display()
    ))
}

/// What the run would take. Draws are taken to be as large as the first.
fn dry_run(
    args: &Compare,
    model: &Model<'_>,
    grid: &Grid,
    draws: &[Domains],
    (tasks, texts): (&[Task], &Domains),
) -> Result<()> {
    let checkpoint = model.checkpoint();
    let samples = eval::reference_samples(tasks, texts);
    let measuring = Measuring::new(model, (tasks, texts), &samples)?;
    let mut forecast = Forecast::new(*model);
    let domains = &draws[0];
    forecast.calibration(domains, &FoldOptions::default())?;
    forecast.keep_tables(domains, grid.tables()?.len());
    let names = || domains.iter().map(|(name, _)| name.as_str());
    let options = ApplyOptions::default();
    let mut largest = 0;
    for key in grid.cells(0) {
        let (request, recover) = key.request()?;
        let plan = requests::rehearse(checkpoint, names(), &request)?;
        forecast.planning(domains, &request, &plan)?;
        if recover.recover == RecoverArg::LeastSquares {
            let sequences = recovery::sequences(domains, &request.domain_weights);
            forecast.fits(&sequences, &plan, options.dtype)?;
        }
        forecast.merging(&plan, options.dtype)?;
        let bytes = output_bytes(checkpoint, &plan, &options)?;
        let recovers = recover.recover != RecoverArg::None;
        forecast.writing(&plan, &options, bytes, recovers)?;
        let kept = plan.accounting.E;
        forecast.figures(&measuring, Pruned { kept, bytes });
        largest = largest.max(bytes);
    }
    forecast.repeated(draws.len());
    forecast.full_figures(&measuring);
    let statistics = StatisticsMemory::new(model.config(), domains.len()).all();
    let sizes = Sizes {
        tokens: models::num_tokens(domains),
        // A pruned checkpoint at a time.
        output: largest + (draws.len() * statistics) as u64,
        is_checkpoint: false,
    };
    forecast.show(sizes, args.json);
    Ok(())
}

fn check_output(output: &Path, model: &Path) -> Result<()> {
    if output.is_file() {
        let output = output.display();
        return Err(usage(format!(
            "--output {output}: is a file; give a folder"
        )));
    }
    let inside = output
        .ancestors()
        .find_map(|a| a.canonicalize().ok())
        .zip(model.canonicalize().ok())
        .is_some_and(|(output, model)| output.starts_with(model));
    if inside {
        let output = output.display();
        return Err(usage(format!(
            "--output {output}: lies inside the input folder, which is never touched; choose another"
        )));
    }
    Ok(())
}

/// Makes the folder, or goes on with one that was begun with the same inputs.
fn prepare(
    args: &Compare,
    checkpoint: &Checkpoint,
    bench: &Bench<'_>,
    draws: &[Domains],
) -> Result<()> {
    let inputs = bench.inputs(checkpoint, draws);
    let path = args.output.join(INPUTS);
    if let Ok(before) = std::fs::read(&path) {
        let before: serde_json::Value = serde_json::from_slice(&before)
            .with_context(|| format!("{} is damaged; use another --output", path.display()))?;
        let keys = inputs.as_object().expect("an object").keys();
        let differing: Vec<&str> = keys
            .filter(|key| before[key.as_str()] != inputs[key.as_str()])
            .map(String::as_str)
            .collect();
        if !differing.is_empty() {
            return Err(usage(format!(
                "--output {}: was begun with other inputs ({}); choose another folder, or delete this one",
                args.output.display(),
                differing.join(", ")
            )));
        }
        return Ok(());
    }
    let taken = std::fs::read_dir(&args.output).is_ok_and(|mut entries| entries.next().is_some());
    if taken {
        return Err(usage(format!(
            "--output {}: is not empty and holds no comparison; choose another folder",
            args.output.display()
        )));
    }
    for folder in [args.output.clone(), args.output.join("cells")] {
        std::fs::create_dir_all(&folder)
            .with_context(|| format!("cannot create {}", folder.display()))?;
    }
    cell::write_json(&path, &inputs)
}

/// Runs what is not there yet; what is there is read.
fn run_cells(bench: &Bench<'_>, grid: &Grid, draws: &[Domains]) -> Result<Vec<Cell>> {
    let total = grid.methods.len() * grid.keeps.len() * draws.len();
    let (mut cells, mut done, mut ran) = (Vec::with_capacity(total), 0, 0);
    let started = Instant::now();
    let tables = grid.tables()?;
    for (seed, domains) in draws.iter().enumerate() {
        let missing = grid.cells(seed).any(|key| !bench.cell_path(&key).exists());
        let statistics = if missing {
            Some(bench.statistics(seed, domains, &tables)?)
        } else {
            None
        };
        let spill = bench.spill.clone();
        let search = Search::new(
            bench.checkpoint,
            domains,
            bench.place,
            (spill, tables.clone()),
        );
        for key in grid.cells(seed) {
            done += 1;
            if let Some(cell) = bench.read_cell(&key)? {
                cells.push(cell);
                continue;
            }
            let statistics = statistics.as_ref().expect("a cell is missing");
            let cell = bench.run_cell(&key, statistics, domains, &search)?;
            ran += 1;
            let left = (total - done) as f64 * started.elapsed().as_secs_f64() / f64::from(ran);
            console::note(&format!(
                "{done}/{total} {}: {}; about {left:.0} s left",
                key.label(),
                cell.summary()
            ));
            cells.push(cell);
        }
    }
    Ok(cells)
}

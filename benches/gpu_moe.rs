//! MoE layers on the GPU, timed by its own clock, beside cuBLAS in the same process. Without a GPU it says so and ends.
//!
//! Inputs are random; weights and tokens rotate over three sets or more, together several times as large as the second
//! cache level; h and y are the same memory each time. Rates count useful FLOPs: real widths, no padding. The baselines
//! do less than we do: they read tokens already gathered and leave SwiGLU out. Launches are asked for one by one; cases
//! of few tokens are timed as a CUDA graph of all sets too, which is how the peers run.
//!
//! | variable | |
//! |---|---|
//! | `TENP_GPU_BENCH` | `short` (the default), `full`, the beginning of a shape's name, or `tiles`: every tile at every row count |
//! | `TENP_GPU_CASE` | runs the launches of this one case a few times and times nothing, for a profiler: `Qwen3-30B-A3B/8192 tokens/full/uniform` |
//! | `TENP_GPU_BENCH_JSON` | where the figures go, `gpu_moe.json` without it; for `scripts/gpu-report.py bench` |

#[path = "gpu/baseline.rs"]
mod baseline;
#[allow(unreachable_pub, reason = "a test uses it too")]
#[path = "gpu/cases.rs"]
mod cases;
#[path = "gpu/clock.rs"]
mod clock;
#[allow(unreachable_pub, reason = "a test uses it too")]
#[path = "gpu/graphs.rs"]
mod graphs;
#[allow(unreachable_pub, reason = "a test uses it too")]
#[path = "gpu/inputs.rs"]
mod inputs;
#[allow(dead_code, unreachable_pub, reason = "a test uses it too")]
#[path = "gpu/layer.rs"]
mod layer;
#[allow(unreachable_pub, reason = "a test uses it too")]
#[path = "gpu/segments.rs"]
mod segments;

use std::cell::RefCell;
use std::io::Write as _;
use std::path::Path;

use criterion::Criterion;
use half::bf16;
use serde_json::{Value, json};
use tenp_kernels::KernelError;
use tenp_kernels::cost::{Ceilings, MoeWork, dense_flops};
use tenp_kernels::device::{DenseShape, Device, DeviceBuffer, Runner as _, Tile, Timer};

use baseline::Baseline;
use cases::{Case, Routing, SHAPES, Shape, Widths};
use clock::{Bench, Measure, Work};
use graphs::{Part, Step};
use inputs::{Noise, Weights};
use layer::{Layer, chosen_tile};
use segments::Comparison;

/// Buffer sets that iterations go through in turn.
const MIN_SETS: usize = 3;

/// Past this many tokens scoring's f32 tables of the largest shape do not fit beside the rest.
const MAX_SCORED_TOKENS: usize = 16_384;

/// Up to so many tokens a case is timed as a graph too: past that launching is hidden behind the kernels.
const MAX_GRAPH_TOKENS: usize = 64;

/// cuBLAS 8192³ in bf16 and a copy of 2 GiB, on this GPU and now.
fn ceilings(bench: &Bench<'_>, noise: &Noise) -> Result<Ceilings, KernelError> {
    const SIZE: usize = 8192;
    const COPY: usize = 2 << 30;
    let device = bench.device;
    let inputs: Vec<DeviceBuffer<bf16>> = (0..=MIN_SETS)
        .map(|s| noise.buffer(device, SIZE * SIZE, 1000 * s))
        .collect::<Result<_, _>>()?;
    let mut out = device.alloc::<bf16>("product", SIZE * SIZE)?;
    let shape = DenseShape::new(SIZE, SIZE, SIZE);
    let flops = dense_flops(SIZE, SIZE, SIZE);
    let seconds = bench.measure(("ceilings", "cuBLAS 8192^3"), flops, MIN_SETS, &mut |set| {
        let (x, weight) = (inputs[set].view(), inputs[set + 1].view());
        device.dense(&shape, x, weight, out.view_mut())
    })?;
    let from = device.zeros::<u8>("copy", COPY)?;
    let mut to = device.alloc::<u8>("copy", COPY)?;
    let bytes = 2.0 * COPY as f64;
    let copy = bench.measure(("ceilings", "copy of 2 GiB"), bytes, 1, &mut |_| {
        to.view_mut().copy_from(device, from.view())
    })?;
    Ok(Ceilings {
        flops: flops / seconds,
        bytes: bytes / copy,
    })
}

/// A figure with its floor and its rates.
fn figures(seconds: f64, (flops, bytes): (f64, f64), ceilings: Ceilings) -> Value {
    let floor = tenp_kernels::cost::floor(flops, bytes, ceilings);
    json!({
        "floor_us": floor.seconds * 1e6,
        "bound": floor.bound.name(),
        "p50_us": seconds * 1e6,
        "useful_tflops": flops / seconds / 1e12,
        "gb_per_s": bytes / seconds / 1e9,
        "share_of_flops_ceiling": flops / seconds / ceilings.flops,
        "share_of_bytes_ceiling": bytes / seconds / ceilings.bytes,
        "share_of_floor": floor.seconds / seconds,
    })
}

/// What a figure is of, and the figure.
fn labelled(mut label: Value, figures: Value) -> Value {
    if let (Value::Object(label), Value::Object(figures)) = (&mut label, figures) {
        label.extend(figures);
    }
    label
}

/// One of our own figures as a row of the report.
fn row(case: &Case, what: &str, seconds: f64, costs: (f64, f64), ceilings: Ceilings) -> Value {
    let label = json!({
        "shape": case.shape.name,
        "tokens": case.tokens,
        "widths": case.widths.name(),
        "routing": case.routing.name(),
        "what": what,
        "launched": "stream",
    });
    labelled(label, figures(seconds, costs, ceilings))
}

/// A layer with all scores, and their parts alone: the directions, both forms of the contributions' product, and what
/// the Gram form takes once for a pass.
fn scores(
    layer: &mut Layer<'_, Device>,
    work: &MoeWork,
    ceilings: Ceilings,
    measure: &Measure<'_>,
) -> Result<Vec<Value>, KernelError> {
    let case = layer.case;
    let made = |what, seconds, costs| row(&case, what, seconds, costs, ceilings);
    let costs = (work.scored_flops(), work.scored_bytes());
    let whole = measure("scored layer", costs.0, &mut |set| layer.scored(set))?;
    let whole = made("scored layer", whole, costs);
    // A rate by bytes: its few operations are no product.
    let costs = (0.0, work.direction_bytes());
    let direction = measure("direction", costs.1, &mut |_| layer.directions())?;
    let direction = made("direction", direction, costs);
    let costs = (work.down_flops(), work.contribution_bytes());
    let with_y = measure("contribution", costs.0, &mut |set| {
        layer.project(set, false)
    })?;
    let with_y = made("contribution", with_y, costs);
    let costs = (work.gram_flops(), work.gram_bytes());
    let matrices = measure("Gram matrices", costs.0, &mut |set| layer.make_gram(set))?;
    let matrices = made("Gram matrices", matrices, costs);
    let (name, costs) = (
        "contribution, Gram form",
        (
            work.gram_contribution_flops(),
            work.gram_contribution_bytes(),
        ),
    );
    let gram = measure(name, costs.0, &mut |set| layer.project(set, true))?;
    Ok(vec![
        whole,
        direction,
        with_y,
        matrices,
        made(name, gram, costs),
    ])
}

/// A case's experts and layer as graphs of all sets in turn.
fn as_graphs(
    bench: &Bench<'_>,
    group: &str,
    mut step: Step<'_, Device>,
    (case, work, sets): (&Case, &MoeWork, usize),
    ceilings: Ceilings,
) -> Result<Vec<Value>, KernelError> {
    for call in step.calls(Part::Layer)? {
        bench.device.run(&call)?;
    }
    let (flops, bytes) = (work.forward_flops(), work.forward_bytes());
    let mut rows = Vec::new();
    for part in Part::ALL {
        // SAFETY: `step` outlives the graph, and nothing else uses its memory while the measurement, which waits for its
        // end, runs.
        let graph = unsafe { bench.device.capture(&step.calls(part)?) }?;
        let name = format!("{}, a graph of {sets}", part.name());
        let all = flops * sets as f64;
        let seconds = bench.measure((group, &name), all, 1, &mut |_| graph.launch())?;
        let seconds = seconds / sets as f64;
        let mut made = row(case, part.name(), seconds, (flops, bytes), ceilings);
        made["launched"] = json!("graph");
        rows.push(made);
    }
    Ok(rows)
}

/// Best matches of segments, in the shapes of the models that DERN was written for.
fn run_segments(
    bench: &Bench<'_>,
    weights: &Weights<Device>,
    shape: &Shape,
    ceilings: Ceilings,
) -> Result<Value, KernelError> {
    let mut comparison = Comparison::new(bench.device, weights, shape)?;
    let (what, costs) = ("segment similarity", comparison.costs());
    let sets = weights.gate_up.len();
    let seconds = bench.measure((shape.name, what), costs.0, sets, &mut |set| {
        comparison.run(set)
    })?;
    let label = json!({
        "shape": shape.name,
        "what": what,
        "launched": "stream",
        "segments": comparison.rows,
        "against": comparison.columns,
    });
    Ok(labelled(label, figures(seconds, costs, ceilings)))
}

fn run_case(
    bench: &Bench<'_>,
    weights: &Weights<Device>,
    noise: &Noise,
    case: Case,
    ceilings: Ceilings,
) -> Result<Vec<Value>, KernelError> {
    let device = bench.device;
    let ids = case.routing.ids(&case.shape, case.tokens);
    let work = case.work(&ids);
    let scored = case.tokens <= MAX_SCORED_TOKENS;
    let tile = chosen_tile(device, &case);
    let mut layer = Layer::new(device, weights, noise, case, &ids, scored, tile)?;
    let group = case.name();
    let sets = weights.gate_up.len();
    let (flops, bytes) = (work.forward_flops(), work.forward_bytes());
    let measure = |name: &str, flops: f64, work: &mut Work<'_>| {
        bench.measure((&group, name), flops, sets, work)
    };
    let ours = measure("experts", flops, &mut |set| layer.experts(set))?;
    let whole = measure("layer", flops, &mut |set| layer.forward(set))?;
    let mut rows = if scored {
        scores(&mut layer, &work, ceilings, &measure)?
    } else {
        Vec::new()
    };
    let mut baseline = Baseline::new(&layer, &work, device)?;
    let [one_by_one, grouped] = baseline.times((device, weights), &layer.h, flops, &measure)?;
    let mut experts = row(&case, "experts", ours, (flops, bytes), ceilings);
    experts["cublas_loop_us"] = json!(one_by_one * 1e6);
    experts["cublas_grouped_us"] = json!(grouped * 1e6);
    experts["times_cublas_loop"] = json!(one_by_one / ours);
    experts["times_cublas_grouped"] = json!(grouped / ours);
    rows.push(experts);
    rows.push(row(&case, "layer", whole, (flops, bytes), ceilings));
    if case.tokens <= MAX_GRAPH_TOKENS {
        let step = Step::new(device, weights, &layer.x, case, &ids)?;
        let of = (&case, &work, sets);
        rows.extend(as_graphs(bench, &group, step, of, ceilings)?);
    }
    Ok(rows)
}

/// Every tile on full widths, with the rows gathered by the product and by a launch before it: what the choice of tiles
/// is to be made from.
fn run_tiles(
    bench: &Bench<'_>,
    shape: &Shape,
    ceilings: Ceilings,
    rows: &mut Vec<Value>,
) -> Result<(), KernelError> {
    let device = bench.device;
    let noise = Noise::new((3.0 / shape.hidden as f32).sqrt());
    let weights = Weights::new(device, &noise, shape, MIN_SETS)?;
    for rows_per_expert in [1, 4, 8, 16, 32, 64, 128, 192, 256, 512, 1024] {
        let case = Case {
            shape: *shape,
            tokens: (rows_per_expert * shape.experts).div_ceil(shape.top_k),
            widths: Widths::Full,
            routing: Routing::Uniform,
        };
        let ids = case.routing.ids(shape, case.tokens);
        let work = case.work(&ids);
        let (flops, bytes) = (work.forward_flops(), work.forward_bytes());
        let group = format!("tiles/{}/{rows_per_expert} rows an expert", shape.name);
        for tile in Tile::of(device.has_wgmma()) {
            for ordered in [false, true] {
                let mut layer = Layer::new(device, &weights, &noise, case, &ids, false, tile)?;
                if ordered {
                    layer.order_rows()?;
                }
                let how = if ordered {
                    "gathered before"
                } else {
                    "gathering"
                };
                let name = format!("{tile:?} {how}");
                let seconds = bench.measure((&group, &name), flops, MIN_SETS, &mut |set| {
                    layer.experts(set)
                })?;
                let mut made = row(&case, &name, seconds, (flops, bytes), ceilings);
                made["rows_per_expert"] = json!(rows_per_expert);
                made["chosen"] = json!(tile == chosen_tile(device, &case));
                rows.push(made);
            }
        }
    }
    Ok(())
}

/// Cases that do not fit into the memory are named in the report instead of measured.
fn run_shape(
    bench: &Bench<'_>,
    shape: &Shape,
    selection: &str,
    ceilings: Ceilings,
    made: &mut Made,
) -> Result<(), KernelError> {
    let device = bench.device;
    let bytes = 6 * shape.experts * shape.width * shape.hidden;
    let sets = MIN_SETS.max((3 * device.properties().l2_bytes).div_ceil(bytes));
    // Spread so that activations stay near 1 from layer to layer.
    let noise = Noise::new((3.0 / shape.hidden as f32).sqrt());
    let weights = Weights::new(device, &noise, shape, sets)?;
    for case in cases::cases(shape, selection) {
        match run_case(bench, &weights, &noise, case, ceilings) {
            Ok(rows) => made.rows.extend(rows),
            Err(error @ KernelError::OutOfMemory { .. }) => made.left_out.push(json!({
                "shape": shape.name,
                "tokens": case.tokens,
                "widths": case.widths.name(),
                "routing": case.routing.name(),
                "why": error.to_string(),
            })),
            Err(error) => return Err(error),
        }
    }
    if shape.name.starts_with("DeepSeek") {
        made.segments
            .push(run_segments(bench, &weights, shape, ceilings)?);
    }
    Ok(())
}

/// Everything that is measured.
#[derive(Default)]
struct Made {
    rows: Vec<Value>,
    segments: Vec<Value>,
    tiles: Vec<Value>,
    left_out: Vec<Value>,
}

/// Every shape that is asked for; what there is goes to the file behind each, so that a run that is ended leaves those
/// before.
fn run(device: &Device, path: &Path) -> Result<(), KernelError> {
    let bench = Bench {
        device,
        timer: Timer::new(device)?,
        criterion: RefCell::new(Criterion::default().without_plots().configure_from_args()),
    };
    let ceilings = ceilings(&bench, &Noise::new(1.0))?;
    let selection = std::env::var("TENP_GPU_BENCH").unwrap_or_else(|_| "short".into());
    let mut made = Made::default();
    for shape in &SHAPES {
        if selection == "tiles" {
            run_tiles(&bench, shape, ceilings, &mut made.tiles)?;
        } else if matches!(selection.as_str(), "short" | "full")
            || shape.name.starts_with(&selection)
        {
            run_shape(&bench, shape, &selection, ceilings, &mut made)?;
        }
        let report = report(device, &selection, ceilings, &made);
        std::fs::write(path, format!("{report:#}\n"))
            .unwrap_or_else(|e| panic!("{}: {e}", path.display()));
    }
    bench.criterion.borrow().final_summary();
    Ok(())
}

fn report(device: &Device, selection: &str, ceilings: Ceilings, made: &Made) -> Value {
    let properties = device.properties();
    json!({
        "format": "tenp-gpu-bench",
        "version": 1,
        "gpu": properties.name,
        "multiprocessors": properties.multiprocessors,
        "l2_bytes": properties.l2_bytes,
        "selection": selection,
        "shapes": SHAPES.map(|s| json!({
            "name": s.name,
            "hidden": s.hidden,
            "width": s.width,
            "experts": s.experts,
            "top_k": s.top_k,
        })),
        "ceilings": {
            "cublas_8192_tflops": ceilings.flops / 1e12,
            "copy_gb_per_s": ceilings.bytes / 1e9,
        },
        "rows": made.rows,
        "segments": made.segments,
        "tiles": made.tiles,
        "left_out": made.left_out,
    })
}

/// The launches of one case, each on every set, for a profiler.
fn run_once(device: &Device, name: &str) -> Result<(), KernelError> {
    let case = Case::named(name).ok_or_else(|| KernelError::Invalid {
        what: "TENP_GPU_CASE",
        why: format!("{name:?} is no case; one is Qwen3-30B-A3B/8192 tokens/full/uniform"),
    })?;
    let noise = Noise::new((3.0 / case.shape.hidden as f32).sqrt());
    let weights = Weights::new(device, &noise, &case.shape, MIN_SETS)?;
    let ids = case.routing.ids(&case.shape, case.tokens);
    let scored = case.tokens <= MAX_SCORED_TOKENS;
    let tile = chosen_tile(device, &case);
    let mut layer = Layer::new(device, &weights, &noise, case, &ids, scored, tile)?;
    for set in 0..MIN_SETS {
        layer.forward(set)?;
        if scored {
            layer.scored(set)?;
        }
    }
    device.synchronize()
}

fn main() {
    let mut stderr = std::io::stderr();
    let device = match Device::open(0) {
        Ok(device) => device,
        Err(error) if error.is_environment() => {
            let _ = writeln!(stderr, "skipped: gpu_moe: no GPU: {error}");
            return;
        }
        Err(error) => panic!("{error}"),
    };
    if let Ok(case) = std::env::var("TENP_GPU_CASE") {
        return run_once(&device, &case).unwrap_or_else(|e| panic!("{e}"));
    }
    let path = std::env::var_os("TENP_GPU_BENCH_JSON").unwrap_or_else(|| "gpu_moe.json".into());
    let path = Path::new(&path);
    run(&device, path).unwrap_or_else(|e| panic!("{e}"));
    let _ = writeln!(stderr, "wrote {}", path.display());
}

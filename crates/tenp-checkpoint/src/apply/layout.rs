//! The tensors of the output and where each one's bytes come from.

use std::collections::HashMap;

use super::Mtp;
use super::form::{Kind, Output};
use crate::fp8::{scale_name, scale_shape, weight_of_scale};
use crate::names::{Part, Spelling, layer_of};
use crate::plan::{ExpertPlan, LayerPlan, Plan};
use crate::{Checkpoint, Dtype, PlannedTensor, TensorView};

/// A tensor to write.
#[derive(Debug)]
pub(super) struct OutputTensor<'a> {
    pub(super) tensor: PlannedTensor,
    pub(super) recipe: Recipe<'a>,
}

/// Where bytes come from.
#[derive(Clone, Debug)]
pub(super) enum Recipe<'a> {
    /// A tensor as it is.
    Copy(TensorView<'a>),
    /// Entries of the experts that stay, along the first axis.
    KeptExperts(TensorView<'a>, &'a LayerPlan),
    /// One matrix of an expert: kept neurons, then zeros up to `width`.
    Expert {
        layer: usize,
        plan: &'a ExpertPlan,
        part: Part,
        width: usize,
    },
    /// Gate and up of every expert that stays, `[E,2·width,H]`.
    FusedGateUp { plan: &'a LayerPlan, width: usize },
    /// Down of every expert that stays, `[E,H,width]`.
    FusedDown { plan: &'a LayerPlan, width: usize },
    /// Scales of an fp8 matrix, of a type.
    Scales(Box<Recipe<'a>>, Dtype),
    /// One matrix of the shared expert, with zeros up to `width`.
    Shared {
        layer: usize,
        part: Part,
        width: usize,
    },
}

impl<'a> Recipe<'a> {
    /// What a tensor of several experts is made of, in order; nothing for others.
    pub(super) fn experts(&self) -> impl Iterator<Item = Recipe<'a>> + use<'a> {
        let (fused, parts): (_, &[Part]) = match self {
            Self::FusedGateUp { plan, width } => (Some((*plan, *width)), &[Part::Gate, Part::Up]),
            Self::FusedDown { plan, width } => (Some((*plan, *width)), &[Part::Down]),
            _ => (None, &[]),
        };
        fused.into_iter().flat_map(move |(layer, width)| {
            layer.kept().flat_map(move |plan| {
                parts.iter().map(move |&part| Recipe::Expert {
                    layer: layer.layer,
                    plan,
                    part,
                    width,
                })
            })
        })
    }
}

/// What a source tensor is, as far as a plan changes it.
#[derive(Clone, Copy)]
enum Slot<'a> {
    Expert(&'a LayerPlan, usize, Part),
    FusedGateUp(&'a LayerPlan),
    FusedDown(&'a LayerPlan),
    Router(&'a LayerPlan),
    CorrectionBias(&'a LayerPlan),
    Shared(&'a LayerPlan, Part),
}

/// Output tensors in the order of the source's, shard by shard, so that both sides are read and written in sequence.
pub(super) fn tensors<'a>(
    checkpoint: &'a Checkpoint,
    plan: &'a Plan,
    mtp: &'a [LayerPlan],
    output: &Output,
) -> Vec<OutputTensor<'a>> {
    let layers = || plan.layers.iter().chain(mtp);
    let slots = slots(checkpoint, layers());
    let builder = Builder {
        hidden: checkpoint.config().hidden_size,
        full: checkpoint.config().moe.expert_width,
        output,
        new_ids: layers()
            .map(|layer| (layer.layer, new_ids(layer)))
            .collect(),
    };
    let config = checkpoint.config();
    let dropped = |name: &str| {
        output.mtp == Mtp::Drop && layer_of(name).is_some_and(|layer| layer >= config.num_layers)
    };
    let mut list = Vec::new();
    for source in checkpoint.tensors().filter(|tensor| !dropped(tensor.name)) {
        if output.kind == Kind::Identical {
            list.push(copy(source, source.name.to_owned()));
            continue;
        }
        // Scales come behind their matrix wherever they lie in the source: both are made at once, of bytes read once.
        if weight_of_scale(source.name).is_some_and(|weight| checkpoint.tensor(weight).is_ok()) {
            continue;
        }
        let first = list.len();
        builder.add_weight(&mut list, source, slots.get(source.name));
        if output.dtype.of(source.dtype) == Dtype::F8E4M3
            && let Ok(scales) = checkpoint.tensor(&scale_name(source.name))
        {
            for matrix in list.split_off(first) {
                let own = scales_of(&matrix, scales);
                list.extend([matrix, own]);
            }
        }
    }
    list
}

/// Output id of every expert; `None` for a dropped one.
fn new_ids(layer: &LayerPlan) -> Vec<Option<usize>> {
    let mut next = 0;
    layer
        .experts
        .iter()
        .map(|expert| {
            (!expert.dropped).then(|| {
                next += 1;
                next - 1
            })
        })
        .collect()
}

fn slots<'a>(
    checkpoint: &Checkpoint,
    layers: impl Iterator<Item = &'a LayerPlan>,
) -> HashMap<String, Slot<'a>> {
    let spelling: Spelling = checkpoint.spelling();
    let mut slots = HashMap::new();
    for layer in layers {
        let index = layer.layer;
        slots.insert(spelling.router(index), Slot::Router(layer));
        slots.insert(spelling.correction_bias(index), Slot::CorrectionBias(layer));
        for part in Part::ALL {
            slots.insert(spelling.shared(index, part), Slot::Shared(layer, part));
        }
        if spelling.fused {
            slots.insert(spelling.fused_gate_up(index), Slot::FusedGateUp(layer));
            slots.insert(spelling.fused_down(index), Slot::FusedDown(layer));
            continue;
        }
        for expert in 0..layer.experts.len() {
            for part in Part::ALL {
                let name = spelling.expert(index, expert, part);
                slots.insert(name, Slot::Expert(layer, expert, part));
            }
        }
    }
    slots
}

fn copy(source: TensorView<'_>, name: String) -> OutputTensor<'_> {
    OutputTensor {
        tensor: PlannedTensor {
            name,
            dtype: source.dtype,
            shape: source.shape.to_vec(),
        },
        recipe: Recipe::Copy(source),
    }
}

/// The scales of an fp8 matrix: the old ones where it is copied.
fn scales_of<'a>(matrix: &OutputTensor<'a>, old: TensorView<'a>) -> OutputTensor<'a> {
    let name = scale_name(&matrix.tensor.name);
    match (&matrix.recipe, &matrix.tensor.shape[..]) {
        (Recipe::Copy(_), _) => copy(old, name),
        (recipe, shape) => OutputTensor {
            tensor: PlannedTensor {
                name,
                dtype: old.dtype,
                shape: scale_shape(shape[0], shape[1]).to_vec(),
            },
            recipe: Recipe::Scales(Box::new(recipe.clone()), old.dtype),
        },
    }
}

struct Builder<'o> {
    hidden: usize,
    /// Expert width before pruning.
    full: usize,
    output: &'o Output,
    new_ids: HashMap<usize, Vec<Option<usize>>>,
}

impl Builder<'_> {
    /// What becomes of a tensor that is not one of scales.
    fn add_weight<'a>(
        &self,
        list: &mut Vec<OutputTensor<'a>>,
        source: TensorView<'a>,
        slot: Option<&Slot<'a>>,
    ) {
        let before = list.len();
        match slot {
            Some(slot) => self.add(list, source, *slot),
            None => list.push(copy(source, source.name.to_owned())),
        }
        for out in &mut list[before..] {
            out.tensor.dtype = self.output.dtype.of(out.tensor.dtype);
        }
    }

    fn add<'a>(&self, list: &mut Vec<OutputTensor<'a>>, source: TensorView<'a>, slot: Slot<'a>) {
        let spelling = self.output.spelling;
        match slot {
            Slot::Expert(layer, expert, part) => {
                self.expert(list, source.dtype, layer, expert, part);
            }
            Slot::FusedGateUp(layer) if !spelling.fused => {
                for expert in 0..layer.experts.len() {
                    self.expert(list, source.dtype, layer, expert, Part::Gate);
                    self.expert(list, source.dtype, layer, expert, Part::Up);
                }
            }
            Slot::FusedDown(layer) if !spelling.fused => {
                for expert in 0..layer.experts.len() {
                    self.expert(list, source.dtype, layer, expert, Part::Down);
                }
            }
            Slot::FusedGateUp(plan) => {
                let width = self.fused_width();
                let shape = vec![self.output.num_experts, 2 * width, self.hidden];
                list.push(planned(source, shape, Recipe::FusedGateUp { plan, width }));
            }
            Slot::FusedDown(plan) => {
                let width = self.fused_width();
                let shape = vec![self.output.num_experts, self.hidden, width];
                list.push(planned(source, shape, Recipe::FusedDown { plan, width }));
            }
            Slot::Router(layer) => {
                per_expert(list, source, layer, spelling.router(layer.layer));
            }
            Slot::CorrectionBias(layer) => {
                per_expert(list, source, layer, spelling.correction_bias(layer.layer));
            }
            Slot::Shared(layer, part) => {
                let width = self.output.shared_width;
                let shape = self.shape(part, width);
                if source.shape == shape {
                    list.push(copy(source, source.name.to_owned()));
                } else {
                    let layer = layer.layer;
                    list.push(planned(
                        source,
                        shape,
                        Recipe::Shared { layer, part, width },
                    ));
                }
            }
        }
    }

    fn expert<'a>(
        &self,
        list: &mut Vec<OutputTensor<'a>>,
        dtype: Dtype,
        layer: &'a LayerPlan,
        expert: usize,
        part: Part,
    ) {
        let new_id = self.new_ids.get(&layer.layer).and_then(|ids| ids[expert]);
        let (Some(id), Some(plan)) = (new_id, layer.experts.get(expert)) else {
            return;
        };
        let width = match self.output.kind {
            Kind::Ragged => plan.width,
            _ => self.fused_width(),
        };
        list.push(OutputTensor {
            tensor: PlannedTensor {
                name: self.output.spelling.expert(layer.layer, id, part),
                dtype,
                shape: self.shape(part, width),
            },
            recipe: Recipe::Expert {
                layer: layer.layer,
                plan,
                part,
                width,
            },
        });
    }

    /// Width of every expert in the forms that have one.
    fn fused_width(&self) -> usize {
        match self.output.kind {
            Kind::Uniform(width) => width,
            _ => self.full,
        }
    }

    fn shape(&self, part: Part, width: usize) -> Vec<usize> {
        match part {
            Part::Gate | Part::Up => vec![width, self.hidden],
            Part::Down => vec![self.hidden, width],
        }
    }
}

/// Rows of the experts that stay.
fn per_expert<'a>(
    list: &mut Vec<OutputTensor<'a>>,
    source: TensorView<'a>,
    layer: &'a LayerPlan,
    name: String,
) {
    let num_experts = layer.kept().count();
    if num_experts == layer.experts.len() {
        list.push(copy(source, name));
        return;
    }
    let mut shape = source.shape.to_vec();
    if let Some(axis) = shape.first_mut() {
        *axis = num_experts;
    }
    list.push(OutputTensor {
        tensor: PlannedTensor {
            name,
            dtype: source.dtype,
            shape,
        },
        recipe: Recipe::KeptExperts(source, layer),
    });
}

fn planned<'a>(source: TensorView<'_>, shape: Vec<usize>, recipe: Recipe<'a>) -> OutputTensor<'a> {
    OutputTensor {
        tensor: PlannedTensor {
            name: source.name.to_owned(),
            dtype: source.dtype,
            shape,
        },
        recipe,
    }
}

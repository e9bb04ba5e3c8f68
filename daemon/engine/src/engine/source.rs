//! Where every routed expert's bytes lie, for the slots of a backend.

use std::{io, path::Path};

use flash_experts::{Record, Source, Storage};

use crate::{
    Error,
    backend::Backend,
    model::families::{Ffn, FfnSpec, Model},
};

pub(super) fn source(model: &Model, backend: &Backend, open: &dyn Fn(&Path) -> io::Result<Box<dyn Storage>>) -> Result<Source, Error> {
    let read = |path: &Path| open(path).map_err(|source| Error::Read { path: path.into(), source });
    let layers = model.layers.iter().enumerate().filter_map(|(index, layer)| match &layer.ffn {
        FfnSpec::Moe { experts, .. } => Some((index, experts)),
        FfnSpec::Dense(_) => None,
    });
    let slices = |layer: usize, ffn: &Ffn| {
        backend.slices(layer, ffn).ok_or_else(|| Error::Tensor {
            path: model.info.path.clone(),
            tensor: ffn.gate.name.clone(),
            reason: "its shape or quantisation differs from the layer's first expert".into(),
        })
    };
    if let Some(packed) = &model.packed {
        let mut records = Vec::with_capacity(packed.records.len());
        for ((layer, experts), entries) in layers.zip(&packed.records) {
            // A record goes into a slot as it is, so it must be what the slot's layout says.
            for (ffn, entry) in experts.iter().zip(entries) {
                if slices(layer, ffn)?.iter().any(|slice| slice.offset != entry.offset + u64::from(slice.at)) {
                    let reason = format!("records of layer {layer} are not laid out as slots are; run `flashctl convert` again");
                    return Err(Error::File { path: packed.path.clone(), reason });
                }
            }
            records.push(entries.iter().map(|entry| Record::stored(0, entry)).collect());
        }
        return Ok(Source { files: vec![read(&packed.path)?], layers: records });
    }
    let files = model.weights.files().iter().map(|path| read(path)).collect::<Result<_, _>>()?;
    let records = |(layer, experts): (usize, &Vec<Ffn>)| experts.iter().map(|ffn| Ok(Record::unchecked(slices(layer, ffn)?))).collect();
    Ok(Source { files, layers: layers.map(records).collect::<Result<_, Error>>()? })
}

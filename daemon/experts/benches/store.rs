//! How fast records of an expert store are written, verified and read here: each way of reading, one to four threads, whole
//! records against the nine odd slices that an unpacked checkpoint has of an expert. Not a test: nothing is asserted.
//! `cargo bench -p flash-experts --bench store -- [DIRECTORY] [RECORDS]`; the file (8 GB by default) is removed at the end.

use std::{error::Error, path::PathBuf, time::Instant};

use flash_experts::{Io, Plan, StoreReader, StoreWriter, measure};

/// An expert of the 30B-A3B shape, 4-bit in groups of 64.
const PAYLOAD: u32 = 2_654_208;
/// Its gate: codes, scales, biases; up and down have as many bytes.
const SLICES: [u32; 3] = [786_432, 49_152, 49_152];
const PER_LAYER: u64 = 128;
const ROUNDS: usize = 3;

fn main() -> Result<(), Box<dyn Error>> {
    // Cargo adds `--bench`.
    let mut arguments = std::env::args().skip(1).filter(|argument| !argument.starts_with("--"));
    let folder = arguments.next().map_or_else(std::env::temp_dir, PathBuf::from);
    let layers = arguments.next().map_or(Ok(3072), |count| count.parse::<u64>())?.div_ceil(PER_LAYER).max(1);
    let folder = tempfile::tempdir_in(folder)?;
    let path = folder.path().join("experts.flash");

    let start = Instant::now();
    let records = vec![vec![PAYLOAD; PER_LAYER as usize]; layers as usize];
    let writer = StoreWriter::create(&path, Plan { records, align: 4096, meta: Vec::new() })?;
    let mut bytes: Vec<u8> = (0..PAYLOAD).map(|i| (i.wrapping_mul(2_654_435_761) >> 13) as u8).collect();
    for layer in 0..layers as usize {
        for expert in 0..PER_LAYER as usize {
            (bytes[0], bytes[1]) = (layer as u8, expert as u8);
            writer.record(layer, expert, &bytes)?;
        }
    }
    let len = writer.len();
    writer.finish()?;
    let speed = |start: Instant| len as f64 / 1e9 / start.elapsed().as_secs_f64();
    println!("{} records of {PAYLOAD} bytes\nwritten    {:6.2} GB/s", layers * PER_LAYER, speed(start));

    let store = StoreReader::open(&path, Io::Auto)?;
    let start = Instant::now();
    let bad = store.verify(&mut |_, _| true);
    println!("verified   {:6.2} GB/s, {} bad", speed(start), bad.len());

    // As in a checkpoint: tensor by tensor, all experts of a layer in each, nothing at a multiple of anything.
    let record = |layer: u64, expert: u64| {
        let mut at = 4109 + layer * PER_LAYER * u64::from(PAYLOAD);
        let mut slice = |len: u32| {
            let offset = at + expert * u64::from(len);
            at += PER_LAYER * u64::from(len);
            (offset, len)
        };
        (0..3).flat_map(|_| SLICES).map(&mut slice).collect::<Vec<_>>()
    };
    // The last layer's last tensor would reach beyond the records.
    let odd: Vec<_> = (0..layers).flat_map(|layer| (0..PER_LAYER - 1).map(move |expert| record(layer, expert))).collect();
    let whole: Vec<_> = store.records().flatten().map(|entry| vec![(entry.offset, entry.payload)]).collect();
    println!("read, GB/s   direct   uring  buffered  mmap");
    for round in 0..ROUNDS {
        for threads in [1, 2, 4] {
            for (what, records) in [("whole", &whole), ("9 slices", &odd)] {
                print!("{round} {threads} {what:9}");
                for (_, result) in measure(&path, records, threads).tried {
                    result.map_or_else(|error| print!("  {error}"), |speed| print!("{:8.2}", speed / 1e9));
                }
                println!();
            }
        }
    }
    Ok(())
}

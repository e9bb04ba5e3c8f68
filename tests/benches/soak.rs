//! Streams under load for as long as it is told, and what is held before, after a fifth of the time, two, and so on:
//! `cargo bench -p flash-tests --bench soak -- 300 200` is five minutes with 200 connections, which is the default. Linux.

use anyhow::Result;

#[cfg(target_os = "linux")]
fn main() -> Result<()> {
    use anyhow::Context;
    use flash_tests::soak::{Soak, soak};

    // Cargo adds a flag of its own.
    let numbers: Result<Vec<u32>, _> = std::env::args().skip(1).filter(|arg| arg != "--bench").map(|arg| arg.parse()).collect();
    let numbers = numbers.context("two numbers: seconds and connections")?;
    let number = |at: usize, default: u32| numbers.get(at).copied().unwrap_or(default);
    let (seconds, connections) = (number(0, 300), number(1, 200));
    println!("{connections} connections for {seconds} s");
    let time = std::time::Duration::from_secs(seconds.into());
    println!("{}", soak(Soak { connections: connections as usize, time, parts: 5 })?);
    Ok(())
}

#[cfg(not(target_os = "linux"))]
fn main() -> Result<()> {
    anyhow::bail!("what a process holds is read from /proc: Linux only")
}

//! Streams under load, some of which are left: the short form of the bench of this name.
#![cfg(target_os = "linux")]

use std::time::Duration;

use anyhow::Result;
use flash_tests::soak::{Soak, soak};

/// What allocators keep for next time though they have been asked for it, as far as that grows in some seconds.
const SLACK_BYTES: u64 = 8 << 20;

#[test]
fn clients_that_leave_cost_the_others_nothing_and_leave_nothing() -> Result<()> {
    let outcome = soak(Soak { connections: 40, time: Duration::from_secs(4), parts: 1 })?;
    assert!(outcome.finished >= 40 && outcome.left >= 40, "{outcome}");
    assert_eq!(outcome.kv_bytes[0], outcome.kv_bytes[1], "{outcome}");
    for held in [&outcome.gateway, &outcome.daemon] {
        let [before, after] = [held[0], held[1]];
        assert_eq!(before.descriptors, after.descriptors, "{outcome}");
        assert!(after.bytes < before.bytes + SLACK_BYTES, "{outcome}");
    }
    Ok(())
}

#![cfg(target_os = "linux")]
//! What the demo does while ping takes its time.
//!
//! A script stands in for ping and looks at its parent in Linux's /proc. The demo runs at first;
//! then it sleeps, state S, if it waits. If it does not, it has ended: its state is Z, or the script
//! has another parent. The script gives up after many looks, so it does not hang.

use std::process::{Command, Stdio};

const PING: &str = r#"#!/bin/sh
looks=0
while read -r pid name state rest < /proc/$PPID/stat && [ $state = R ]; do
    [ $((looks += 1)) -lt 1000000 ] || break
done
echo "its parent: $PPID $state""#;

#[test]
fn the_parent_waits_for_ping() {
    let path = concat!(env!("CARGO_TARGET_TMPDIR"), "/subpro-waits");
    // The shell writes it: a file that this process has open for writing cannot be run.
    let write = r#"rm -rf "$0" && mkdir "$0" && cd "$0" || exit
        for p in ps grep ls ping; do printf '%s' "$PING" > $p; chmod +x $p; done"#;
    let written = Command::new("/bin/sh")
        .args(["-c", write, path])
        .env("PING", PING)
        .status();
    assert!(written.unwrap().success());

    let run = Command::new(env!("CARGO_BIN_EXE_subpro"))
        .env("PATH", path)
        .stdout(Stdio::piped())
        .spawn()
        .unwrap();
    let waits = format!("its parent: {} S\n", run.id());
    let output = run.wait_with_output().unwrap().stdout;
    let output = String::from_utf8(output).unwrap();
    assert!(output.ends_with(&waits), "it does not wait: {output}");
}

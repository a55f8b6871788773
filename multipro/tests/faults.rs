#![cfg(target_os = "linux")]
//! Damage that is done to the demo from outside, and what must become of it.
//!
//! The output goes to a file that `ulimit -f` limits to 512 bytes, and there is room left for the
//! parent's first two lines. So the child cannot print, and SIGXFSZ kills it, or it panics if that
//! is ignored. Orphans become children of this process, so `run` finds any that the parent did not
//! wait for.

use std::fs;
use std::os::unix::process::CommandExt;
use std::process::{Command, Output, Stdio};
use std::sync::mpsc;
use std::thread;
use std::time::Duration;

use nix::sys::prctl::set_child_subreaper;
use nix::sys::signal::{Signal, killpg};
use nix::unistd::Pid;

#[test]
fn the_parent_waits_for_the_child() {
    let run = run("exec \"$0\"", "");
    assert!(run.status.success(), "{run:?}");
}

#[test]
fn a_child_that_was_killed_is_reported() {
    let error = fail_in_child("multipro-killed", "");
    assert!(error.starts_with("Error: \"process "), "{error}");
    assert!(error.ends_with(" was killed by SIGXFSZ\"\n"), "{error}");
}

#[test]
fn a_child_that_panics_is_reported() {
    let error = fail_in_child("multipro-panics", "trap '' XFSZ;");
    assert!(error.contains("panicked"), "{error}");
    assert!(error.contains("\nError: \"process "), "{error}");
    assert!(error.ends_with(" exited with status 1\"\n"), "{error}");
}

/// Returns what is shown on standard error when the child has no room to print.
fn fail_in_child(name: &str, trap: &str) -> String {
    let file = format!("{}/{name}", env!("CARGO_TARGET_TMPDIR"));
    let script = format!("{trap} ulimit -f 1; exec \"$0\" >> \"$1\"");
    let room = "Parent process 1234567.\nChild process will start.\n".len();
    fs::write(&file, vec![b'\n'; 512 - room]).unwrap();
    let run = run(&script, &file);
    assert_eq!(run.status.code(), Some(1), "{run:?}");
    String::from_utf8(run.stderr).unwrap()
}

/// Runs a shell script that becomes the demo by `exec "$0"`, until all its processes have ended.
fn run(script: &str, file: &str) -> Output {
    set_child_subreaper(true).unwrap();
    let run = Command::new("/bin/sh")
        .args(["-c", script, env!("CARGO_BIN_EXE_multipro"), file])
        .process_group(0)
        .stdout(Stdio::piped())
        .stderr(Stdio::piped())
        .spawn()
        .unwrap();
    let group = Pid::from_raw(run.id().try_into().unwrap());
    let (over, watched) = mpsc::channel();
    let watchdog = thread::spawn(move || {
        let hangs = watched.recv_timeout(Duration::from_secs(60)).is_err();
        hangs && killpg(group, Signal::SIGKILL).is_ok()
    });
    let output = run.wait_with_output().unwrap();
    let _ = over.send(()); // nobody is there to be told if it hung
    assert!(!watchdog.join().unwrap(), "it hangs: {output:?}");
    let orphan = killpg(group, None).is_ok();
    assert!(
        !orphan,
        "a child that the parent did not wait for: {output:?}"
    );
    output
}

#![cfg(target_os = "linux")]
//! Damage that is done to the demo from outside, and what must become of it.
//!
//! The output goes to a file that `ulimit -f` limits to 512 bytes, and there is room left for the
//! first line and the parent's second one. So the child cannot print, and SIGXFSZ kills it, or it
//! panics if that is ignored. If the child comes first, so does the parent, and the run is repeated.
//! Orphans become children of this process, so `run` finds any that the parent did not wait for.

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
    let error = fail_in_child("fork-killed", "");
    assert!(error.starts_with("Error: \"child process: "), "{error}");
    assert!(error.contains("SIGXFSZ"), "{error}");
}

#[test]
fn a_child_that_panics_is_reported() {
    let error = fail_in_child("fork-panics", "trap '' XFSZ;");
    assert!(error.contains("panicked"), "{error}");
    assert!(error.contains("\nError: \"child process: "), "{error}");
    assert!(error.ends_with(", 101)\"\n"), "{error}");
}

/// Returns what is shown on standard error when the child, and it alone, has no room to print.
fn fail_in_child(name: &str, trap: &str) -> String {
    let file = format!("{}/{name}", env!("CARGO_TARGET_TMPDIR"));
    let script = format!("{trap} ulimit -f 1; exec \"$0\" >> \"$1\"");
    let lines = "Process (1234567) start...\nI (1234567) just created a child process (1234567).\n";
    for _ in 0..100 {
        fs::write(&file, vec![b'\n'; 512 - lines.len()]).unwrap();
        let run = run(&script, &file);
        // The parent's line ends so; the child's does not.
        if fs::read_to_string(&file).unwrap().contains(").\n") {
            assert_eq!(run.status.code(), Some(1), "{run:?}");
            return String::from_utf8(run.stderr).unwrap();
        }
    }
    panic!("in none of 100 runs did the parent print its line");
}

/// Runs a shell script that becomes the demo by `exec "$0"`, until all its processes have ended.
fn run(script: &str, file: &str) -> Output {
    set_child_subreaper(true).unwrap();
    let run = Command::new("/bin/sh")
        .args(["-c", script, env!("CARGO_BIN_EXE_fork"), file])
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
    // A parent that could not print its own line has died, and did not wait.
    let orphan = matches!(output.status.code(), Some(0 | 1)) && killpg(group, None).is_ok();
    assert!(
        !orphan,
        "a child that the parent did not wait for: {output:?}"
    );
    output
}

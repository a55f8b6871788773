#![cfg(target_os = "linux")]
//! Damage that is done to the demo from outside, and what must become of it.
//!
//! The output goes to a file that `ulimit -f` limits to 512 bytes, and there is room left for the
//! parent's first two lines. So the child cannot print, and SIGXFSZ kills it, or it panics if that
//! is ignored. Orphans become children of this process, so `run` finds any that the parent did not
//! wait for. A run that hangs is killed, and `run` says so.

use std::fs::{self, File};
use std::io::{Read, Write};
use std::os::fd::OwnedFd;
use std::os::unix::net::UnixStream;
use std::os::unix::process::CommandExt;
use std::process::{Command, ExitStatus};
use std::sync::mpsc;
use std::thread;
use std::time::Duration;

use nix::sys::prctl::set_child_subreaper;
use nix::sys::signal::{Signal, killpg};
use nix::unistd::Pid;

#[test]
fn the_parent_waits_for_the_child() {
    let (status, error) = run("exec \"$0\"", "/dev/null", |_| ());
    assert!(status.success(), "{error}");
}

#[test]
fn a_child_that_was_killed_is_reported() {
    let file = limited("multipro-killed");
    let (status, error) = run("ulimit -f 1; exec \"$0\"", &file, |_| ());
    assert_eq!(status.code(), Some(1), "{error}");
    assert!(error.starts_with("Error: \"process "), "{error}");
    assert!(error.ends_with(" was killed by SIGXFSZ\"\n"), "{error}");
}

/// There is room again as soon as the child shows its panic, so that it can print the rest.
#[test]
fn a_child_that_panics_is_reported_and_loses_nothing() {
    let file = limited("multipro-panics");
    let script = "trap '' XFSZ; ulimit -f 1; exec \"$0\"";
    let (status, error) = run(script, &file, |parent| {
        // The child prints what there is room for, and then waits to show its panic.
        poll(|| fs::metadata(&file).unwrap().len() == 512 || state(parent) == 'Z');
        let child = fs::read_to_string(format!("/proc/{parent}/task/{parent}/children"));
        let child = child.unwrap().trim().parse().expect("one child");
        poll(|| ['S', 'Z'].contains(&state(child)));
        fs::write(&file, "").unwrap();
    });
    assert_eq!(status.code(), Some(1), "{error}");
    assert!(error.contains("panicked"), "{error}");
    assert!(error.contains("\nError: \"process "), "{error}");
    assert!(error.ends_with(" exited with status 1\"\n"), "{error}");
    let rest = fs::read_to_string(&file).unwrap();
    assert!(rest.ends_with(")...\n"), "the rest of the line: {rest}");
}

/// A file with room for the parent's lines, and for a part of the child's.
fn limited(name: &str) -> String {
    let file = format!("{}/{name}", env!("CARGO_TARGET_TMPDIR"));
    let lines = "Parent process 1234567.\nChild process will start.\nRun";
    fs::write(&file, vec![b'\n'; 512 - lines.len()]).unwrap();
    file
}

/// Runs a shell script that becomes the demo by `exec "$0"`, until all its processes have ended.
/// Nothing can be written to its standard error before `meanwhile` has returned.
fn run(script: &str, file: &str, meanwhile: impl FnOnce(i32)) -> (ExitStatus, String) {
    set_child_subreaper(true).unwrap();
    let (mut errors, full) = UnixStream::pair().unwrap();
    full.set_nonblocking(true).unwrap();
    while (&full).write(b" ").is_ok() {}
    full.set_nonblocking(false).unwrap();
    let mut demo = Command::new("/bin/sh")
        .args(["-c", script, env!("CARGO_BIN_EXE_multipro")])
        .process_group(0)
        .stdout(File::options().append(true).open(file).unwrap())
        .stderr(OwnedFd::from(full))
        .spawn()
        .unwrap();
    let group = Pid::from_raw(demo.id().try_into().unwrap());
    let (over, watched) = mpsc::channel();
    let watchdog = thread::spawn(move || {
        let hangs = watched.recv_timeout(Duration::from_secs(60)).is_err();
        hangs && killpg(group, Signal::SIGKILL).is_ok()
    });
    meanwhile(group.as_raw());
    let mut error = String::new();
    errors.read_to_string(&mut error).unwrap();
    let status = demo.wait().unwrap();
    let _ = over.send(()); // nobody is there to be told if it hung
    assert!(!watchdog.join().unwrap(), "it hangs: {error}");
    let orphan = killpg(group, None).is_ok();
    assert!(!orphan, "a child that the parent did not wait for: {error}");
    (status, error.trim_start().to_string())
}

fn poll(condition: impl Fn() -> bool) {
    while !condition() {
        thread::sleep(Duration::from_millis(1));
    }
}

/// What a process does, by Linux's letter for it: S if it sleeps, Z if it has ended.
fn state(pid: i32) -> char {
    let stat = fs::read_to_string(format!("/proc/{pid}/stat")).unwrap_or(") Z".to_string());
    stat.rsplit(") ").next().unwrap().chars().next().unwrap()
}

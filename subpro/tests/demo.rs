//! What the tutorial shows in 四、subprocess. A change of `main` needs a change here.
//!
//! Scripts stand in for the programs that `main` runs, so that no network is needed. Each prints
//! its name and its arguments and fails, which Python's program ignores. The script for grep also
//! passes on what it reads. The script for ping first closes its output, then sleeps, then writes
//! a file: the file exists after the run only if the parent has waited.

use std::process::{Command, Output};
use std::{env, fs};

const SCRIPT: &str = r#"#!/bin/sh
PATH=$TOOLS
[ ${0##*/} = grep ] && cat
printf '%s' ${0##*/}; printf ' [%s]' "$@"; echo
[ ${0##*/} = ping ] && exec >&- 2>&- && sleep 0.3 && : >"$0.ended"
exit 1"#;

const LINES: [&str; 6] = [
    "ps [-aux]",
    "grep [python]",
    "---------------",
    "ls [-l]",
    "---------------",
    "ping [-c] [4] [www.baidu.com]",
];

#[test]
fn three_programs_print_in_order() {
    let run = run("all", &["ps", "grep", "ls", "ping"]);
    assert!(run.status.success() && run.stderr.is_empty(), "{run:?}");
    assert_eq!(lines(&run), LINES);
    let ping_ended = concat!(env!("CARGO_TARGET_TMPDIR"), "/all/ping.ended");
    assert!(fs::exists(ping_ended).unwrap(), "the parent did not wait");
}

#[test]
fn a_missing_program_is_named() {
    let run_without_ping = run("no-ping", &["ps", "grep", "ls"]);
    assert!(!run_without_ping.status.success(), "{run_without_ping:?}");
    assert_eq!(lines(&run_without_ping), LINES[..5]);
    let error = String::from_utf8(run_without_ping.stderr).unwrap();
    assert!(error.starts_with("Error: \"ping: "), "{error}");

    let run_without_ls = run("no-ls", &["ps", "grep", "ping"]);
    assert!(!run_without_ls.status.success(), "{run_without_ls:?}");
    assert_eq!(lines(&run_without_ls), LINES[..3]);
    let error = String::from_utf8(run_without_ls.stderr).unwrap();
    assert!(error.starts_with("Error: \"ls: "), "{error}");
}

/// Runs the demo with nothing but the scripts of these names on its path.
fn run(name: &str, programs: &[&str]) -> Output {
    let path = format!("{}/{name}", env!("CARGO_TARGET_TMPDIR"));
    // The shell writes them: a file that this process has open for writing cannot be run.
    let write = r#"rm -rf "$0" && mkdir "$0" && cd "$0" || exit
        for p; do printf '%s' "$SCRIPT" > $p; chmod +x $p; done"#;
    let written = Command::new("/bin/sh")
        .args(["-c", write, &path])
        .args(programs)
        .env("SCRIPT", SCRIPT)
        .status();
    assert!(written.unwrap().success());
    let tools = env::var_os("PATH").unwrap_or_default();
    let mut run = Command::new(env!(concat!("CARGO_BIN_EXE_", env!("CARGO_PKG_NAME"))));
    run.env("TOOLS", tools).env("PATH", path);
    run.output().unwrap()
}

fn lines(run: &Output) -> Vec<&str> {
    let output = std::str::from_utf8(&run.stdout);
    output.unwrap().lines().collect()
}

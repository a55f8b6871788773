//! What `mod multiprocessing` promises: a table of small programs, and what each must print.
//!
//! A program runs in a process of its own, which has a single thread, as the module requires. So
//! there is no `#[test]` here, but a `main` that runs the table (`harness = false` in Cargo.toml).
//!
//! To add a promise, copy one: `announce` prints the error that `join` is to report, and
//! `failed_as_announced` compares the two. `cargo test -- 'a child'` runs the promises with these
//! words in their names.

use std::error::Error;
use std::io;
use std::os::fd::AsRawFd;
use std::os::unix::process::CommandExt;
use std::panic::{self, AssertUnwindSafe};
use std::process::{self, Command, Stdio};
use std::sync::mpsc;
use std::time::Duration;
use std::{env, thread};

use nix::libc;
use nix::sys::signal::{self, SaFlags, SigAction, SigHandler, SigSet, Signal};
use nix::unistd::{Pid, getpid, getppid};

use demo::multiprocessing::Process;

// The module is in a program, which a test can only include; its `main` is not used.
#[path = "../src/main.rs"]
#[allow(dead_code)]
mod demo;

struct Promise {
    name: &'static str,
    program: fn() -> Result<(), Box<dyn Error>>,
    holds: fn(&Run) -> bool,
}

/// How a program has ended.
#[derive(Debug)]
struct Run {
    ok: bool, // whether its exit status was 0
    output: String,
    errors: String,
}

const PROMISES: &[Promise] = &[
    Promise {
        name: "the child runs the target with its argument, and `join` waits for it",
        program: || {
            let run_proc = |parent| {
                thread::sleep(Duration::from_millis(100));
                assert_eq!(getppid(), parent);
                println!("child");
            };
            let mut p = Process::new(run_proc, getpid());
            p.start()?;
            p.join()?;
            println!("parent");
            p.join()
        },
        holds: |run| run.ok && run.output == "child\nparent\n",
    },
    Promise {
        name: "an error of the target is shown, and reported by `join`",
        program: || {
            let fail = |()| {
                announce("exited with status 1");
                Err::<(), _>("on purpose")
            };
            let mut p = Process::new(fail, ());
            p.start()?;
            p.join()
        },
        holds: |run| run.failed_as_announced() && run.errors.starts_with("Error: \"on purpose\"\n"),
    },
    Promise {
        name: "a panic is shown, ends the child alone, and is reported by `join`",
        program: || {
            let _dropped_by_the_parent_alone = PrintsWhenDropped;
            let panic = |()| {
                announce("exited with status 1");
                panic::panic_any(PanicsWhenDropped);
            };
            let mut p = Process::new(panic, ());
            p.start()?;
            p.join()
        },
        holds: |run| {
            let drops = run.errors.matches("dropped").count();
            run.failed_as_announced() && run.errors.contains("panicked") && drops == 1
        },
    },
    Promise {
        name: "a child skips the exit handlers of its parent",
        program: || {
            extern "C" fn handler() {
                println!("exit handler");
            }
            // SAFETY: the handler prints, and no more.
            unsafe { libc::atexit(handler) };
            let mut p = Process::new(|()| (), ());
            p.start()?;
            p.join()
        },
        holds: |run| run.ok && run.output == "exit handler\n",
    },
    Promise {
        name: "a child that exits is reported by `join`",
        program: || {
            let exit = |()| {
                announce("exited with status 3");
                process::exit(3);
            };
            let mut p = Process::new(exit, ());
            p.start()?;
            p.join()
        },
        holds: |run| run.failed_as_announced(),
    },
    Promise {
        name: "a child that was killed is reported by `join`",
        program: || {
            let be_killed = |signal: Signal| {
                announce(&format!("was killed by {signal}"));
                signal::raise(signal)
            };
            let mut p = Process::new(be_killed, Signal::SIGTERM);
            p.start()?;
            p.join()
        },
        holds: |run| run.failed_as_announced(),
    },
    Promise {
        name: "a child that cannot be waited for is reported by `join`",
        program: || {
            // While SIGCHLD is ignored, a child that ends leaves nothing to wait for.
            // SAFETY: no handler is set.
            unsafe { signal::signal(Signal::SIGCHLD, SigHandler::SigIgn) }?;
            let mut p = Process::new(|()| (), ());
            p.start()?;
            p.join()
        },
        holds: |run| !run.ok && run.errors.contains(" cannot be waited for: ECHILD"),
    },
    Promise {
        name: "an unfinished line comes out once, after a panic as well",
        program: || {
            print!("parent, ");
            let panic = |()| {
                print!("child, ");
                panic!("on purpose");
            };
            let mut p = Process::new(panic, ());
            p.start()?;
            let joined = p.join();
            print!("end");
            joined
        },
        holds: |run| !run.ok && run.output == "parent, child, end",
    },
    Promise {
        name: "a child whose output was lost has failed",
        program: || {
            let lose_output = |()| {
                announce("exited with status 1");
                print!("unfinished");
                break_stdout();
            };
            let mut p = Process::new(lose_output, ());
            p.start()?;
            p.join()
        },
        holds: |run| run.failed_as_announced(),
    },
    Promise {
        name: "a process is not started when output was lost before",
        program: || {
            print!("unfinished");
            break_stdout();
            let mut p = Process::new(|()| (), ());
            eprintln!("{}", p.start().unwrap_err());
            p.join()
        },
        holds: |run| {
            let not_started = run.errors.contains("can only join a started process");
            !run.ok && run.errors.starts_with("stdout: ") && not_started
        },
    },
    Promise {
        name: "a process that is dropped goes on by itself",
        program: || {
            let outlive = |parent| {
                while getppid() == parent {
                    thread::sleep(Duration::from_millis(1));
                }
                println!("child");
            };
            Process::new(outlive, getpid()).start()
        },
        holds: |run| run.ok && run.output == "child\n",
    },
    Promise {
        name: "signals do not interrupt `join`",
        program: || {
            handle_sigusr1();
            let mut p = Process::new(signal_parent, ());
            p.start()?;
            p.join()
        },
        holds: |run| run.ok,
    },
    Promise {
        name: "a misuse is a panic in Python's words",
        program: || {
            let mut p = Process::new(|()| (), ());
            assert!(panic::catch_unwind(AssertUnwindSafe(|| p.join())).is_err());
            p.start()?;
            assert!(panic::catch_unwind(AssertUnwindSafe(|| p.start())).is_err());
            p.join()
        },
        holds: |run| {
            let join = run.errors.contains("can only join a started process");
            run.ok && join && run.errors.contains("cannot start a process twice")
        },
    },
];

impl Run {
    /// Whether the program failed with the error that one of its processes had announced.
    fn failed_as_announced(&self) -> bool {
        let error = format!("Error: \"{}\"\n", self.output.trim_end());
        !self.ok && self.errors.ends_with(&error)
    }
}

/// Prints how this process is going to fail, in the words in which `join` is to report it.
fn announce(failure: &str) {
    println!("process {} {failure}", getpid());
}

/// Handles SIGUSR1, without the flag that resumes what the signal interrupts.
fn handle_sigusr1() {
    extern "C" fn do_nothing(_: i32) {}
    let handler = SigHandler::Handler(do_nothing);
    let action = SigAction::new(handler, SaFlags::empty(), SigSet::empty());
    // SAFETY: the handler does nothing.
    unsafe { signal::sigaction(Signal::SIGUSR1, &action) }.unwrap();
}

fn signal_parent((): ()) {
    for _ in 0..20 {
        thread::sleep(Duration::from_millis(5));
        signal::kill(getppid(), Signal::SIGUSR1).unwrap();
    }
}

/// Replaces standard output by a pipe that nobody reads.
fn break_stdout() {
    let (_, write_end) = io::pipe().unwrap();
    // SAFETY: std uses standard output by its number alone.
    unsafe { libc::dup2(write_end.as_raw_fd(), libc::STDOUT_FILENO) };
}

/// Something that must not be dropped.
struct PanicsWhenDropped;

impl Drop for PanicsWhenDropped {
    fn drop(&mut self) {
        panic!("dropped");
    }
}

struct PrintsWhenDropped;

impl Drop for PrintsWhenDropped {
    fn drop(&mut self) {
        eprintln!("dropped");
    }
}

/// Runs the promises whose names contain one of the arguments, or all if there are none.
///
/// `cargo nextest run` first asks for the names (`--list`), and then runs each one (`--exact`).
fn main() -> Result<(), Box<dyn Error>> {
    let (mut flags, mut words, mut skipped) = (Vec::new(), Vec::new(), Vec::new());
    let mut args = env::args().skip(1);
    while let Some(arg) = args.next() {
        match arg.as_str() {
            "--program" => return (named(&args.next().unwrap_or_default())?.program)(),
            "--skip" => skipped.extend(args.next()),
            "--color" | "--format" | "--test-threads" => drop(args.next()), // a value is no name
            flag if flag.starts_with('-') => flags.push(arg),
            _ => words.push(arg),
        }
    }
    let flagged = |flag: &str| flags.iter().any(|f| f == flag);
    let mut chosen: Vec<&Promise> = PROMISES.iter().collect();
    if flagged("--exact") && !words.is_empty() {
        chosen = words
            .iter()
            .map(|name| named(name))
            .collect::<Result<_, _>>()?;
    } else if !words.is_empty() {
        chosen.retain(|promise| words.iter().any(|word| promise.name.contains(word)));
    }
    chosen.retain(|promise| !skipped.iter().any(|word| promise.name.contains(word)));

    if flagged("--ignored") {
        chosen.clear(); // none is
    }
    if flagged("--list") {
        for promise in &chosen {
            println!("{}: test", promise.name);
        }
        return Ok(());
    }
    let mut broken = 0;
    for promise in &chosen {
        let ended = run(promise.name);
        if ended.as_ref().is_ok_and(promise.holds) {
            println!("test {} ... ok", promise.name);
        } else {
            println!("test {} ... FAILED: {ended:#?}", promise.name);
            broken += 1;
        }
    }
    println!("{} passed, {broken} failed", chosen.len() - broken);
    if broken > 0 {
        return Err("not all promises hold".into());
    }
    Ok(())
}

fn named(name: &str) -> Result<&'static Promise, Box<dyn Error>> {
    let promise = PROMISES.iter().find(|p| p.name == name);
    promise.ok_or_else(|| format!("there is no promise named '{name}'").into())
}

/// Runs the program of a promise until all its processes have ended, for ten seconds at most.
fn run(name: &str) -> Result<Run, Box<dyn Error>> {
    let program = Command::new(env::current_exe()?)
        .args(["--program", name])
        .env("RUST_BACKTRACE", "0")
        .process_group(0)
        .stdout(Stdio::piped())
        .stderr(Stdio::piped())
        .spawn()?;
    let group = Pid::from_raw(program.id().try_into()?);
    let (sender, receiver) = mpsc::channel();
    // All processes of the program hold the pipes, and so the output ends when none is left.
    thread::spawn(move || sender.send(program.wait_with_output()));
    let Ok(ended) = receiver.recv_timeout(Duration::from_secs(10)) else {
        signal::killpg(group, Signal::SIGKILL)?;
        return Err("not over after ten seconds".into());
    };
    let ended = ended?;
    Ok(Run {
        ok: ended.status.success(),
        output: String::from_utf8_lossy(&ended.stdout).into(),
        errors: String::from_utf8_lossy(&ended.stderr).into(),
    })
}

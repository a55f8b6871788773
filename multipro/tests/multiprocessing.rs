//! What `mod multiprocessing` promises: each promise is a name and a small program that asserts,
//! and returns what it and its children must print.
//!
//! A program runs in a process of its own, which has a single thread, as the module requires. So
//! there is no `#[test]` here, but a `main` that runs the programs (`harness = false` in
//! Cargo.toml).
//!
//! To add a promise, copy one; the helpers are below the list. What is printed to stderr does not
//! count. No name may be a part of another's, since a name on the command line chooses all that
//! contain it.

use std::error::Error;
use std::io::{self, PipeWriter, Write};
use std::os::fd::{AsRawFd, RawFd};
use std::os::unix::process::CommandExt;
use std::panic::{self, AssertUnwindSafe};
use std::process::{self, Command, ExitCode, Stdio, Termination};
use std::sync::mpsc;
use std::time::Duration;
use std::{env, thread};

use nix::libc;
use nix::sys::signal::{self, SaFlags, SigAction, SigHandler, SigSet, Signal};
use nix::unistd::{Pid, alarm, getpid, getppid};

use demo::multiprocessing::Process;

// The module is in a program, which a test can only include; its `main` is not used.
#[path = "../src/main.rs"]
#[allow(dead_code)]
mod demo;

type Program = fn() -> Result<&'static str, Box<dyn Error>>;

const PROMISES: &[(&str, Program)] = &[
    ("the target gets its argument, in a child", || {
        let run_proc = |(name, parent)| {
            assert_eq!(getppid(), parent);
            println!("{name}");
        };
        let mut p = Process::new(run_proc, ("test", getpid()));
        p.start()?;
        p.join()?;
        Ok("test\n")
    }),
    ("`join` waits for its own child, once", || {
        let sleep = |()| {
            thread::sleep(Duration::from_millis(100));
            println!("child");
        };
        let mut slow = start(sleep, ())?;
        let mut quick = start(|()| process::exit(3), ())?;
        slow.join()?;
        println!("parent");
        assert!(error(quick.join()).ends_with(" exited with status 3"));
        quick.join()?;
        Ok("child\nparent\n")
    }),
    ("`join` says how a child has failed", || {
        assert_eq!(failure(|| Err::<(), _>("no")), "exited with status 1");
        assert_eq!(failure(|| ExitCode::from(3)), "exited with status 1");
        assert_eq!(failure(|| panic!("no")), "exited with status 1");
        assert_eq!(failure(|| process::exit(3)), "exited with status 3");
        let kill = || signal::raise(Signal::SIGTERM);
        assert_eq!(failure(kill), "was killed by SIGTERM");
        // While SIGCHLD is ignored, a child that ends leaves nothing to wait for.
        // SAFETY: no handler is set.
        unsafe { signal::signal(Signal::SIGCHLD, SigHandler::SigIgn) }?;
        assert!(failure(|| ()).starts_with("has an unknown exit status: ECHILD"));
        Ok("")
    }),
    ("an error of the target is shown like one of `main`", || {
        failure(|| {
            replace(libc::STDERR_FILENO, &io::stdout());
            Err::<(), _>("on purpose")
        });
        Ok("Error: \"on purpose\"\n")
    }),
    ("an unfinished line comes out once", || {
        print!("parent, ");
        failure(|| {
            print!("child, ");
            panic!("on purpose");
        });
        print!("end");
        Ok("parent, child, end")
    }),
    ("a child whose output is lost has failed", || {
        assert_eq!(failure(lose_output), "exited with status 1");
        lose_output();
        let mut p = Process::new(|()| (), ());
        assert!(error(p.start()).starts_with("stdout: "));
        assert_eq!(misuse(|| p.join()), "can only join a started process");
        Ok("")
    }),
    ("a panic goes no further than its child", || {
        extern "C" fn handler() {
            println!("exit handler");
        }
        // SAFETY: the handler prints, and no more.
        unsafe { libc::atexit(handler) };
        panic::set_hook(Box::new(|_| println!("shown")));
        let _in_the_parent = PrintsWhenDropped;
        failure(|| panic::panic_any(PrintsWhenDropped));
        Ok("shown\ndropped\nexit handler\n")
    }),
    ("a process that is dropped goes on", || {
        let outlive = |parent| {
            while getppid() == parent {
                thread::sleep(Duration::from_millis(1));
            }
            println!("child");
        };
        start(outlive, getpid())?; // which drops it
        Ok("child\n")
    }),
    ("signals do not interrupt `join`", || {
        handle_sigusr1()?;
        let mut p = start(send_signals, getpid())?;
        p.join()?;
        Ok("")
    }),
    ("a misuse is a panic with Python's message", || {
        let mut p = Process::new(|()| (), ());
        assert_eq!(misuse(|| p.join()), "can only join a started process");
        p.start()?;
        assert_eq!(misuse(|| p.start()), "cannot start a process twice");
        p.join()?;
        Ok("")
    }),
];

fn start<A, R: Termination>(target: fn(A) -> R, args: A) -> Result<Process<A, R>, Box<dyn Error>> {
    let mut p = Process::new(target, args);
    p.start()?;
    Ok(p)
}

/// Runs `target` in a child, which must fail. Returns the error of `join` without the child's id.
#[track_caller]
fn failure<R: Termination>(target: fn() -> R) -> String {
    let run = |(target, mut id): (fn() -> R, PipeWriter)| {
        write!(id, "process {} ", getpid()).unwrap();
        drop(id);
        target()
    };
    let (read_end, write_end) = io::pipe().unwrap();
    let error = error(start(run, (target, write_end)).unwrap().join());
    let child = io::read_to_string(read_end).unwrap();
    error.strip_prefix(&child).expect(&error).to_string()
}

#[track_caller]
fn error<T>(result: Result<T, Box<dyn Error>>) -> String {
    result.err().expect("no error").to_string()
}

/// Returns the message of the panic in `call`.
#[track_caller]
fn misuse<T>(call: impl FnOnce() -> T) -> &'static str {
    let ended = panic::catch_unwind(AssertUnwindSafe(call));
    let payload = ended.err().expect("no panic");
    payload.downcast_ref::<&str>().expect("no message")
}

/// Leaves an unfinished line that cannot be flushed, since nobody reads it.
fn lose_output() {
    print!("unfinished");
    let (_, without_reader) = io::pipe().unwrap();
    replace(libc::STDOUT_FILENO, &without_reader);
}

/// Makes `fd` a descriptor of `file`.
#[track_caller]
fn replace(fd: RawFd, file: &impl AsRawFd) {
    // SAFETY: std uses stdout and stderr by their numbers alone.
    assert_eq!(unsafe { libc::dup2(file.as_raw_fd(), fd) }, fd);
}

struct PrintsWhenDropped;

impl Drop for PrintsWhenDropped {
    fn drop(&mut self) {
        println!("dropped");
    }
}

/// Handles SIGUSR1, without the flag that resumes what the signal interrupts.
fn handle_sigusr1() -> nix::Result<SigAction> {
    extern "C" fn do_nothing(_: i32) {}
    let handler = SigHandler::Handler(do_nothing);
    let action = SigAction::new(handler, SaFlags::empty(), SigSet::empty());
    // SAFETY: the handler does nothing.
    unsafe { signal::sigaction(Signal::SIGUSR1, &action) }
}

fn send_signals(parent: Pid) {
    for _ in 0..20 {
        thread::sleep(Duration::from_millis(5));
        signal::kill(parent, Signal::SIGUSR1).unwrap();
    }
}

/// Runs the promises whose names contain one of the words, or all if there are none.
///
/// `cargo nextest run` first asks for the names (`--list`), and then runs each by its name.
fn main() -> Result<(), Box<dyn Error>> {
    let (mut words, mut skip, mut list) = (Vec::new(), Vec::new(), false);
    let mut args = env::args().skip(1);
    while let Some(arg) = args.next() {
        match arg.as_str() {
            "--program" => return program(&args.next().unwrap_or_default()),
            "--list" => list = true,
            "--skip" => skip.extend(args.next()),
            "--ignored" => words.push(arg), // which no name contains, since no promise is ignored
            // The next one is the flag's value, and no word.
            "-Z" | "--color" | "--format" | "--logfile" | "--test-threads" => drop(args.next()),
            flag if flag.starts_with('-') => (),
            _ => words.push(arg),
        }
    }
    let (mut passed, mut failed, mut skipped) = (0, 0, 0);
    for (name, _) in PROMISES {
        let contains = |word: &String| name.contains(word.as_str());
        let chosen = words.is_empty() || words.iter().any(contains);
        if !chosen || skip.iter().any(contains) {
            skipped += 1;
        } else if list {
            println!("{name}: test");
        } else if let Err(error) = run(name) {
            println!("test {name} ... FAILED: {error}");
            failed += 1;
        } else {
            println!("test {name} ... ok");
            passed += 1;
        }
    }
    if !list {
        println!("{passed} passed, {failed} failed, {skipped} skipped");
    }
    if failed > 0 {
        return Err("not all promises hold".into());
    }
    Ok(())
}

/// Runs the program of a promise until all its processes have ended, for half a minute at most.
fn run(name: &str) -> Result<(), Box<dyn Error>> {
    let program = Command::new(env::current_exe()?)
        .args(["--program", name])
        .env("RUST_BACKTRACE", "0")
        .process_group(0)
        .stdout(Stdio::piped())
        .stderr(Stdio::piped())
        .spawn()?;
    let group = Pid::from_raw(program.id().try_into()?);
    let (sender, receiver) = mpsc::channel();
    // All processes of the program hold the pipes, so the output ends when none is left.
    thread::spawn(move || sender.send(program.wait_with_output()));
    let (late, ended) = if let Ok(ended) = receiver.recv_timeout(Duration::from_secs(30)) {
        ("", ended?)
    } else {
        let _ = signal::killpg(group, Signal::SIGKILL); // it fails if the last has just ended
        (", killed after half a minute", receiver.recv()??)
    };
    let output = String::from_utf8_lossy(&ended.stdout);
    let errors = String::from_utf8_lossy(&ended.stderr);
    let as_promised = errors.contains(&format!("must print {output:?}\n"));
    if as_promised && ended.status.success() && late.is_empty() {
        return Ok(());
    }
    let status = ended.status;
    Err(format!("printed {output:?} ({status}{late})\n{errors}").into())
}

/// Runs the program of a promise in this process, and writes to stderr what it must have printed.
fn program(name: &str) -> Result<(), Box<dyn Error>> {
    // Ends this process, and each that it forks, also when the tests have been killed.
    extern "C" fn end_in_time() {
        alarm::set(40);
    }
    end_in_time();
    // SAFETY: the handler sets an alarm, and no more.
    unsafe { libc::pthread_atfork(None, None, Some(end_in_time)) };
    let promise = PROMISES.iter().find(|promise| promise.0 == name);
    let (_, program) = promise.ok_or("there is no such promise")?;
    let line = format!("must print {:?}\n", program()?);
    eprint!("{line}"); // in one piece, since other processes may print errors at the same time
    Ok(())
}

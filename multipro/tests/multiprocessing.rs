//! What `mod multiprocessing` promises: each promise is a test by a small program that uses it.
//!
//! To add one, copy a `promise!`, and change its name and its program, which returns the text that
//! must be printed. Make processes only in a `promise!`: other tests run beside other threads. All
//! that is `pub` in `main.rs` is `demo::…` here, and in a test file that has the same `mod demo`.

use std::error::Error;
use std::io::{self, PipeWriter, Write};
use std::os::fd::{AsRawFd, RawFd};
use std::panic::{self, AssertUnwindSafe};
use std::process::{self, Command, ExitCode, Termination};
use std::time::{Duration, Instant};
use std::{env, thread};

use nix::libc;
use nix::sys::signal::{self, SaFlags, SigAction, SigHandler, SigSet, Signal};
use nix::sys::wait::{WaitStatus, waitpid};
use nix::unistd::{ForkResult, Pid, alarm, fork, getpid, getppid, setpgid};

use demo::multiprocessing::Process;

// A test cannot `use` a program: it includes `main.rs`, and does not call its `main`.
#[path = "../src/main.rs"]
#[allow(dead_code)]
mod demo;

type Program = fn() -> Result<&'static str, Box<dyn Error>>;

/// Makes a test from a program with assertions, which returns what it and its children must print
/// to stdout. The test runs the program in a new process, which has one thread, as the module
/// requires, and which SIGALRM ends after half a minute.
macro_rules! promise {
    ($name:ident, $program:expr) => {
        #[test]
        fn $name() {
            run(stringify!($name), $program);
        }
    };
}

promise!(the_target_gets_its_argument_in_a_child, || {
    let run_proc = |(name, parent)| {
        assert_eq!(getppid(), parent);
        println!("{name}");
    };
    let mut p = Process::new(run_proc, ("test", getpid()));
    p.start()?;
    p.join()?;
    Ok("test\n")
});

promise!(join_waits_for_its_own_child_once, || {
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
});

promise!(join_says_how_a_child_has_failed, || {
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
});

promise!(an_error_of_the_target_is_shown_like_one_of_main, || {
    failure(|| {
        replace(libc::STDERR_FILENO, &io::stdout());
        Err::<(), _>("on purpose")
    });
    Ok("Error: \"on purpose\"\n")
});

promise!(an_unfinished_line_comes_out_once, || {
    print!("parent, ");
    failure(|| {
        print!("child, ");
        panic!("on purpose");
    });
    print!("end");
    Ok("parent, child, end")
});

promise!(a_child_whose_output_is_lost_has_failed, || {
    assert_eq!(failure(lose_output), "exited with status 1");
    lose_output();
    assert!(error(start(|()| (), ())).starts_with("stdout: "));
    let mut p = Process::new(|()| (), ());
    assert!(error(p.start()).starts_with("stdout: "));
    assert_eq!(misuse(|| p.join()), "can only join a started process");
    Ok("")
});

promise!(a_panic_goes_no_further_than_its_child, || {
    extern "C" fn handler() {
        println!("exit handler");
    }
    // SAFETY: the handler prints, and no more.
    unsafe { libc::atexit(handler) };
    panic::set_hook(Box::new(|_| println!("shown")));
    let _in_the_parent = PrintsWhenDropped;
    failure(|| panic::panic_any(PrintsWhenDropped));
    Ok("shown\ndropped\nexit handler\n")
});

promise!(a_process_that_is_dropped_goes_on, || {
    let outlive = |parent| {
        while getppid() == parent {
            thread::sleep(Duration::from_millis(1));
        }
        println!("child");
    };
    start(outlive, getpid())?; // dropped here
    Ok("child\n")
});

promise!(signals_do_not_interrupt_join, || {
    handle_sigusr1()?;
    let mut p = start(send_signals, getpid())?;
    p.join()?;
    Ok("")
});

promise!(a_misuse_is_a_panic_with_pythons_message, || {
    let mut p = Process::new(|()| (), ());
    assert_eq!(misuse(|| p.join()), "can only join a started process");
    p.start()?;
    assert_eq!(misuse(|| p.start()), "cannot start a process twice");
    p.join()?;
    Ok("")
});

fn start<A, R: Termination>(target: fn(A) -> R, args: A) -> Result<Process<A, R>, Box<dyn Error>> {
    let mut p = Process::new(target, args);
    p.start()?;
    Ok(p)
}

/// Runs `target` in a child, which must fail. Returns the error of `join` without the child's id.
#[track_caller]
fn failure<R: Termination>(target: fn() -> R) -> String {
    let run = |(target, mut write_end): (fn() -> R, PipeWriter)| {
        write!(write_end, "process {} ", getpid()).unwrap();
        drop(write_end);
        target()
    };
    let (read_end, write_end) = io::pipe().unwrap();
    let error = error(start(run, (target, write_end)).unwrap().join());
    let child = io::read_to_string(read_end).unwrap();
    error.strip_prefix(&child).expect(&error).to_string()
}

#[track_caller]
fn error<T: std::fmt::Debug>(result: Result<T, Box<dyn Error>>) -> String {
    result.unwrap_err().to_string()
}

/// Returns the message of the panic in `call`.
#[track_caller]
fn misuse<T: std::fmt::Debug>(call: impl FnOnce() -> T) -> &'static str {
    let payload = panic::catch_unwind(AssertUnwindSafe(call)).unwrap_err();
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

/// Handles SIGUSR1 without SA_RESTART, so that it interrupts calls that wait.
fn handle_sigusr1() -> nix::Result<SigAction> {
    extern "C" fn do_nothing(_: i32) {}
    let handler = SigHandler::Handler(do_nothing);
    let action = SigAction::new(handler, SaFlags::empty(), SigSet::empty());
    // SAFETY: the handler does nothing.
    unsafe { signal::sigaction(Signal::SIGUSR1, &action) }
}

fn send_signals(parent: Pid) {
    for _ in 0..5 {
        thread::sleep(Duration::from_millis(5));
        signal::kill(parent, Signal::SIGUSR1).unwrap();
    }
}

/// Runs the program in a second process of this test, and checks what it prints.
#[track_caller]
fn run(name: &str, program: Program) {
    let begin = format!("{name} prints:\n"); // what stands above it is the test harness's
    if env::var_os("PROMISE").is_some_and(|promise| promise == name) {
        run_in_child(&begin, program);
    }
    let start = Instant::now();
    let test = Command::new(env::current_exe().unwrap())
        .args([name, "--exact", "--nocapture"])
        .envs([("PROMISE", name), ("RUST_BACKTRACE", "0")])
        .output() // waits until no process of the program is left
        .unwrap();
    let hung = start.elapsed() >= Duration::from_secs(30);
    let output = String::from_utf8_lossy(&test.stdout);
    let errors = String::from_utf8_lossy(&test.stderr);
    let (_, printed) = output.split_once(&begin).expect(&errors);
    let seen = format!("{errors}printed {printed:?}");
    assert!(!hung, "hung: SIGALRM ended it after half a minute\n{seen}");
    let as_promised = errors.contains(&format!("must print {printed:?}\n"));
    assert!(as_promised && test.status.success(), "{seen}");
}

/// Runs the program in a child. Writes to stderr what it must print, and how it ended.
fn run_in_child(begin: &str, program: Program) -> ! {
    // Ends each process half a minute after its fork, even if the tests have been killed.
    extern "C" fn end_in_time() {
        alarm::set(30);
    }
    // SAFETY: the handler sets an alarm, and no more.
    unsafe { libc::pthread_atfork(None, None, Some(end_in_time)) };
    for signal in [Signal::SIGALRM, Signal::SIGTERM] {
        // SAFETY: no handler is set. (Without this, a signal that is ignored stays ignored.)
        unsafe { signal::signal(signal, SigHandler::SigDfl) }.unwrap();
    }
    print!("{begin}");
    io::stdout().flush().unwrap();
    // SAFETY: the only other thread, the test harness's, holds no lock but perhaps the allocator's,
    // which fork handles.
    match unsafe { fork() }.unwrap() {
        ForkResult::Child => {
            // A group of its own: otherwise a signal to the group would reach the tests.
            setpgid(Pid::from_raw(0), Pid::from_raw(0)).unwrap();
            let ended = panic::catch_unwind(|| {
                let text = program().expect("the program returned an error");
                let line = format!("must print {text:?}\n");
                eprint!("{line}"); // in one piece: its children may print errors meanwhile
            });
            process::exit(i32::from(ended.is_err()))
        }
        ForkResult::Parent { child } => {
            let status = waitpid(child, None).unwrap();
            eprintln!("the program ended: {status:?}");
            process::exit(i32::from(status != WaitStatus::Exited(child, 0)))
        }
    }
}

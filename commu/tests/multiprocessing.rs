//! What `mod multiprocessing` promises: each promise is a test by a small program that uses it.
//!
//! To add one, copy a `promise!`, and change its name and its program, which returns the text that
//! must be printed. Make processes only in a `promise!`: other tests run beside other threads. All
//! that is `pub` in `main.rs` is `demo::…` here, and in a test file that has the same `mod demo`.

use std::error::Error;
use std::fs::File;
use std::io::{self, PipeReader, PipeWriter, Read, Write};
use std::os::fd::{AsRawFd, RawFd};
use std::panic::{self, AssertUnwindSafe};
use std::process::{self, Command, ExitCode, Termination};
use std::time::{Duration, Instant};
use std::{env, thread};

use nix::libc;
use nix::sys::signal::{self, SaFlags, SigAction, SigHandler, SigSet, Signal};
use nix::sys::wait::{WaitPidFlag, WaitStatus, waitpid};
use nix::unistd::{ForkResult, Pid, alarm, fork, getpid, getppid, setpgid};

use demo::multiprocessing::{Process, Queue};

// A test cannot `use` a program: it includes `main.rs`, and does not call its `main`.
#[path = "../src/main.rs"]
#[allow(dead_code)]
mod demo;

/// The length of the longest value that a queue takes.
const LONGEST: usize = libc::PIPE_BUF - size_of::<usize>();

const NO_READER: &str = "no reader of the queue is left";
const NO_WRITER: &str = "no writer of the queue is left";

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

promise!(each_child_draws_new_random_numbers, || {
    let draw = |q: &Queue| q.put(&rand::random::<u64>().to_string());
    let mut numbers = vec![rand::random::<u64>().to_string()];
    let q = Queue::new()?;
    start(draw, &q)?;
    start(draw, &q)?;
    numbers.extend([q.get()?, q.get()?, rand::random::<u64>().to_string()]);
    numbers.sort();
    numbers.dedup();
    assert_eq!(numbers.len(), 4);
    Ok("")
});

promise!(terminate_ends_even_a_child_that_is_stopped, || {
    let mut p = start(|()| signal::raise(Signal::SIGSTOP), ())?;
    waitpid(None, Some(WaitPidFlag::WUNTRACED))?; // until the child is stopped
    p.terminate()?;
    p.join()?;
    Ok("")
});

promise!(terminate_waits_and_says_how_a_child_has_failed, || {
    fn terminate(target: fn()) -> Result<(), Box<dyn Error>> {
        start(|target: fn()| target(), target)?.terminate()
    }
    // SAFETY: no handler is set.
    unsafe { signal::signal(Signal::SIGTERM, SigHandler::SigIgn) }?; // in the children as well
    terminate(|| {
        thread::sleep(Duration::from_millis(100));
        println!("child");
    })?;
    println!("parent");
    assert!(error(terminate(|| process::exit(3))).ends_with(" exited with status 3"));
    let kill = || signal::raise(Signal::SIGKILL).unwrap();
    assert!(error(terminate(kill)).ends_with(" was killed by SIGKILL"));
    Ok("child\nparent\n")
});

promise!(terminate_does_nothing_when_no_child_is_left, || {
    let mut p = Process::new(|()| process::exit(3), ());
    p.terminate()?;
    p.start()?;
    error(p.join());
    p.terminate()?;
    let mut unknown = start(|()| (), ())?;
    waitpid(None, None)?; // afterwards, no process has the child's id
    assert!(error(unknown.terminate()).contains(" cannot be terminated: ESRCH"));
    Ok("")
});

promise!(values_come_out_intact_and_in_order, || {
    let put = |q: &Queue| {
        q.put("进程\n")?;
        q.put("")?;
        q.put(&"x".repeat(LONGEST))
    };
    let q = Queue::new()?;
    let mut pw = start(put, &q)?;
    assert_eq!(q.get()?, "进程\n");
    assert_eq!(q.get()?, "");
    assert_eq!(q.get()?, "x".repeat(LONGEST));
    pw.join()?;
    Ok("")
});

promise!(a_value_that_is_too_long_is_refused_each_time, || {
    let put = |q: &Queue| {
        let too_long = "x".repeat(LONGEST + 1);
        let message = format!("a value has at most {LONGEST} bytes, not {}", LONGEST + 1);
        assert_eq!(error(q.put(&too_long)), message);
        assert_eq!(error(q.put(&too_long)), message);
        error(q.put(&"文".repeat(LONGEST / 3 + 1))); // three bytes each
        q.put("A")
    };
    let q = Queue::new()?;
    let mut pw = start(put, &q)?;
    assert_eq!(q.get()?, "A");
    pw.join()?;
    Ok("")
});

promise!(values_of_several_writers_do_not_interleave, || {
    fn value(writer: usize, i: usize) -> String {
        let length = LONGEST - i % 100;
        format!("{:x<length$}", format!("{writer} {i} "))
    }
    let put = |(q, writer): (&Queue, _)| (0..300).try_for_each(|i| q.put(&value(writer, i)));
    let q = Queue::new()?;
    let mut writers = [0, 1, 2, 3].map(|writer| Process::new(put, (&q, writer)));
    writers.iter_mut().try_for_each(Process::start)?;
    let mut next = [0; 4];
    for _ in 0..4 * 300 {
        let got = q.get()?;
        let writer: usize = got[..1].parse()?;
        assert_eq!(got, value(writer, next[writer]));
        next[writer] += 1;
    }
    writers.iter_mut().try_for_each(Process::join)?;
    Ok("")
});

promise!(a_writer_that_is_killed_leaves_values_intact, || {
    let put = |q: &Queue| while q.put(&"x".repeat(LONGEST)).is_ok() {};
    let q = Queue::new()?;
    let mut pw = start(put, &q)?;
    thread::sleep(Duration::from_millis(100)); // so that the pipe is full
    pw.terminate()?;
    let failure = loop {
        match q.get() {
            Ok(value) => assert_eq!(value, "x".repeat(LONGEST)),
            failure => break error(failure),
        }
    };
    assert_eq!(failure, NO_WRITER);
    Ok("")
});

promise!(requests_and_replies_go_through_two_queues, || {
    let answer = |(requests, replies): (&Queue, &Queue)| {
        (0..300).try_for_each(|_| replies.put(&requests.get()?))
    };
    let (requests, replies) = (Queue::new()?, Queue::new()?);
    let mut p = start(answer, (&requests, &replies))?;
    for i in 0..300 {
        requests.put(&i.to_string())?;
    }
    p.join()?;
    for i in 0..300 {
        assert_eq!(replies.get()?, i.to_string());
    }
    Ok("")
});

promise!(queue_join_waits_until_the_reader_has_printed_all, || {
    let q = Queue::new()?;
    let mut pr = start(read_slowly, &q)?;
    for _ in 0..3 {
        q.put("A")?;
        q.put("B")?;
        q.join()?;
        println!("joined");
    }
    pr.terminate()?;
    Ok("A B joined\nA B joined\nA B joined\n")
});

promise!(queue_join_waits_for_its_own_answer, || {
    let read = |(q, mut gate): (&Queue, &PipeReader)| {
        gate.read_exact(&mut [0])?;
        read_slowly(q)
    };
    let q = Queue::new()?;
    let (gate, mut opens_gate) = io::pipe()?;
    let mut pr = start(read, (&q, &gate))?;
    let mut other = start(Queue::join, &q)?;
    q.put("A")?;
    thread::sleep(Duration::from_millis(100)); // so that the other process waits for an answer
    other.terminate()?;
    opens_gate.write_all(&[0])?;
    q.put("B")?;
    q.join()?;
    println!("joined");
    pr.terminate()?;
    Ok("A B joined\n")
});

promise!(a_process_may_be_killed_in_queue_join, || {
    let put = |q: &Queue| {
        thread::sleep(Duration::from_millis(100)); // so that the other process waits
        q.put("A")
    };
    let q = Queue::new()?;
    let mut other = start(Queue::join, &q)?;
    start(put, &q)?.join()?;
    other.terminate()?;
    assert_eq!(q.get()?, "A");
    assert_eq!(error(q.get()), NO_WRITER);
    Ok("")
});

promise!(each_call_fails_without_another_process, || {
    assert_eq!(error(Queue::new()?.put("A")), NO_READER);
    assert_eq!(error(Queue::new()?.join()), NO_READER);
    assert_eq!(error(Queue::new()?.get()), NO_WRITER);
    Ok("")
});

promise!(put_and_queue_join_fail_when_no_reader_is_left, || {
    let q = Queue::new()?;
    let mut pr = start(|q: &Queue| q.get().map(drop), &q)?;
    q.put("A")?;
    pr.join()?;
    assert_eq!(error(q.put("B")), NO_READER);
    assert_eq!(error(q.join()), NO_READER);
    Ok("")
});

promise!(a_process_is_either_the_reader_or_a_writer, || {
    const NOT_BOTH: &str = "a process cannot be both the reader and a writer of a queue";
    let write = |q: &Queue| {
        q.put("A")?;
        assert_eq!(error(q.get()), NOT_BOTH);
        q.put("B")
    };
    let q = Queue::new()?;
    let mut pw = start(write, &q)?;
    assert_eq!(q.get()?, "A");
    assert_eq!(error(q.put("C")), NOT_BOTH);
    assert_eq!(error(q.join()), NOT_BOTH);
    assert_eq!(q.get()?, "B");
    pw.join()?;
    Ok("")
});

promise!(signals_do_not_interrupt_a_queue, || {
    let read = |(q, parent): (&Queue, _)| {
        for _ in 0..25 {
            send_signals(parent); // while the pipe is full, in `put` and then in `join`
            q.get()?;
        }
        send_signals(parent); // while the parent waits for the answer
        q.get().map(drop)
    };
    let write = |(q, parent): (&Queue, _)| {
        send_signals(parent); // while the parent waits for a value
        q.put("A")
    };
    handle_sigusr1()?;
    let (first, second) = (Queue::new()?, Queue::new()?);
    let mut pr = start(read, (&first, getpid()))?;
    for _ in 0..25 {
        first.put(&"x".repeat(LONGEST))?;
    }
    first.join()?;
    pr.terminate()?;
    let mut pw = start(write, (&second, getpid()))?;
    assert_eq!(second.get()?, "A");
    pw.join()?;
    Ok("")
});

promise!(the_reader_ends_when_the_parent_was_killed, || {
    let be_killed = || -> Result<(), Box<dyn Error>> {
        let write = |(q, parent): (&Queue, Pid)| {
            while getppid() == parent {
                thread::sleep(Duration::from_millis(1));
            }
            q.put("A")
        };
        let read = |q: &Queue| -> Result<(), Box<dyn Error>> {
            replace(libc::STDERR_FILENO, &io::stdout());
            loop {
                println!("{}", q.get()?);
            }
        };
        let q = Queue::new()?;
        start(write, (&q, getpid()))?;
        start(read, &q)?;
        signal::raise(Signal::SIGKILL)?;
        Ok(())
    };
    assert_eq!(failure(be_killed), "was killed by SIGKILL");
    Ok("A\nError: \"no writer of the queue is left\"\n")
});

promise!(a_reader_whose_output_is_lost_does_not_answer, || {
    let read = |q: &Queue| {
        replace(libc::STDERR_FILENO, &io::stdout());
        lose_output();
        q.get().map(drop)
    };
    let q = Queue::new()?;
    let mut pr = start(read, &q)?;
    assert_eq!(error(q.join()), NO_READER);
    assert!(error(pr.join()).ends_with(" exited with status 1"));
    Ok("Error: \"stdout: Broken pipe (os error 32)\"\n")
});

promise!(a_queue_needs_room_for_two_pipes, || {
    // `free` is the lowest descriptor that a pipe can take. Each pipe takes two.
    let free = File::open("/dev/null")?.as_raw_fd();
    for room in [2, 0] {
        let limit = (free + room).try_into()?;
        let limits = libc::rlimit {
            rlim_cur: limit,
            rlim_max: limit,
        };
        // SAFETY: `setrlimit` reads `limits`, and no more.
        unsafe { libc::setrlimit(libc::RLIMIT_NOFILE, &limits) };
        assert!(error(Queue::new()).starts_with("pipe: "));
    }
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

fn read_slowly(q: &Queue) -> Result<(), Box<dyn Error>> {
    loop {
        let value = q.get()?;
        thread::sleep(Duration::from_millis(20));
        print!("{value} ");
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

//! What `mod multiprocessing` promises: each promise is a test by a small program that uses it.
//!
//! To add one, copy a `promise!`, and change its name and its program, which returns the text that
//! must be printed. Make processes only in a `promise!`: other tests run beside other threads. All
//! that is `pub` in `main.rs` is `demo::…` here, and in a test file that has the same `mod demo`.

use std::error::Error;
use std::fs::File;
use std::io::{self, PipeReader, PipeWriter, Read, Write};
use std::os::fd::{AsRawFd, RawFd};
use std::os::unix::process::{CommandExt, parent_id};
use std::process::{self, Command};
use std::sync::LazyLock;
use std::time::{Duration, Instant};
use std::{env, panic, thread};

use nix::errno::Errno;
use nix::libc;
use nix::sys::signal::{self, SaFlags, SigAction, SigHandler, SigSet, Signal};
use nix::sys::wait::{WaitStatus, wait, waitpid};
use nix::unistd::{ForkResult, Pid, alarm, fork, setpgid};

use demo::multiprocessing::Pool;

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

promise!(each_task_is_done_once_however_many_there_are, || {
    let mut p = Pool::new(4)?;
    let mut done = Vec::new();
    for i in 0..10_000 {
        p.apply_async(|i| send(&RESULTS, i), !i)?; // uses all bits of a task's argument
        if i >= 300 {
            done.push(receive(&RESULTS)); // 300 stay unread: more might fill the pipe
        }
    }
    p.close();
    p.join()?;
    done.extend([(); 300].map(|()| receive(&RESULTS)));
    done.sort_unstable();
    assert!(done.into_iter().rev().map(|i| !i).eq(0..10_000));
    send(&RESULTS, 0);
    assert_eq!(receive(&RESULTS), 0); // no other result was there
    Ok("")
});

promise!(a_worker_that_is_free_takes_the_next_task, || {
    let mut p = Pool::new(2)?;
    p.apply_async(|_| assert_eq!(receive(&GATE), 0), 0)?;
    for i in 1..10 {
        p.apply_async(|i| println!("{i}"), i)?;
    }
    p.apply_async(|_| send(&GATE, 0), 0)?;
    p.close();
    p.join()?;
    Ok("1\n2\n3\n4\n5\n6\n7\n8\n9\n")
});

promise!(join_says_how_a_worker_has_failed, || {
    let panics: [fn(usize); 2] = [|_| panic!("no"), |_| println!("goes on")];
    assert_eq!(failure(&panics), "exited with status 1");
    assert_eq!(failure(&[|_| process::exit(0)]), "exited with status 0");
    let exec = |_| drop(Command::new("true").exec());
    assert_eq!(failure(&[exec]), "exited with status 0");
    // The exit statuses next to that of a worker without a failure:
    assert_eq!(failure(&[|_| process::exit(117)]), "exited with status 117");
    assert_eq!(failure(&[|_| process::exit(119)]), "exited with status 119");
    let kill = |_| signal::raise(Signal::SIGKILL).unwrap();
    assert_eq!(failure(&[kill]), "was killed by SIGKILL");
    assert_eq!(failure(&[|_| lose_output()]), "exited with status 1");
    // Makes the worker read end-of-file, and no task.
    let replace_the_pipe_by_null = |_| {
        let null = File::open("/dev/null").unwrap();
        for fd in 3..null.as_raw_fd() {
            replace(fd, &null);
        }
    };
    let tasks: [fn(usize); 2] = [replace_the_pipe_by_null, |_| println!("not done")];
    assert_eq!(failure(&tasks), "exited with status 1");
    // While SIGCHLD is ignored, a worker that ends leaves nothing to wait for.
    // SAFETY: no handler is set.
    unsafe { signal::signal(Signal::SIGCHLD, SigHandler::SigIgn) }?;
    assert!(failure(&[]).starts_with("has an unknown exit status: ECHILD"));
    Ok("goes on\n")
});

promise!(other_workers_do_the_remaining_tasks, || {
    let mut p = Pool::new(3)?;
    let be_killed = |_| {
        send(&RESULTS, id());
        signal::raise(Signal::SIGKILL).unwrap();
    };
    p.apply_async(be_killed, 0)?;
    let first = format!("worker {} was killed by SIGKILL", receive(&RESULTS));
    p.apply_async(be_killed, 0)?;
    let second = format!("worker {} was killed by SIGKILL", receive(&RESULTS));
    for _ in 0..10 {
        p.apply_async(|_| print!("."), 0)?;
    }
    p.close();
    let error = error(p.join());
    let both = [format!("{first}, {second}"), format!("{second}, {first}")];
    assert!(both.contains(&error), "{error}");
    p.join()?;
    Ok("..........")
});

promise!(no_task_can_be_queued_when_no_worker_is_left, || {
    let mut p = Pool::new(1)?;
    p.apply_async(|_| process::exit(3), 0)?;
    while p.apply_async(|_| (), 0).is_ok() {}
    assert_eq!(error(p.apply_async(|_| (), 0)), "no worker is left");
    p.close();
    assert!(error(p.join()).ends_with(" exited with status 3"));
    Ok("")
});

promise!(an_unfinished_line_comes_out_once, || {
    print!("parent, ");
    let task = |_| {
        print!("task, ");
        panic!("on purpose");
    };
    failure(&[task]);
    print!("end");
    Ok("parent, task, end")
});

promise!(a_panic_goes_no_further_than_its_task, || {
    extern "C" fn handler() {
        println!("exit handler");
    }
    // SAFETY: the handler prints, and no more.
    unsafe { libc::atexit(handler) };
    panic::set_hook(Box::new(|_| println!("shown")));
    let _in_the_parent = PrintsWhenDropped;
    failure(&[|_| panic::panic_any(PrintsWhenDropped)]);
    Ok("shown\ndropped\nexit handler\n")
});

promise!(each_worker_draws_new_random_numbers, || {
    fn draw() -> usize {
        rand::random::<u64>() as usize
    }
    let draw_and_wait = |_| {
        send(&RESULTS, draw());
        receive(&GATE);
    };
    let mut numbers = vec![draw()];
    let mut p = Pool::new(2)?;
    p.apply_async(draw_and_wait, 0)?;
    p.apply_async(draw_and_wait, 0)?;
    // One number comes from each worker, since both wait.
    numbers.extend([receive(&RESULTS), receive(&RESULTS), draw()]);
    send(&GATE, 0);
    send(&GATE, 0);
    p.close();
    p.join()?;
    numbers.sort_unstable();
    numbers.dedup();
    assert_eq!(numbers.len(), 4);
    Ok("")
});

promise!(a_process_that_a_task_has_forked_takes_no_task, || {
    #[cfg(target_os = "linux")] // where this process then becomes the parent of the orphan
    nix::sys::prctl::set_child_subreaper(true)?;
    let leave_an_orphan = |_| {
        receive(&GATE);
        let worker = id();
        // SAFETY: a worker has one thread.
        if let ForkResult::Parent { .. } = unsafe { fork() }.unwrap() {
            process::exit(3);
        }
        outlive(worker);
    };
    let mut p = Pool::new(1)?;
    p.apply_async(leave_an_orphan, 0)?;
    p.apply_async(|_| println!("taken"), 0)?;
    p.close();
    send(&GATE, 0);
    assert!(error(p.join()).ends_with(" exited with status 3"));
    let _ = wait(); // for the orphan, if this process is its parent
    Ok("")
});

promise!(a_pool_can_be_joined_while_a_later_one_lives, || {
    let mut first = Pool::new(2)?;
    let mut second = Pool::new(2)?;
    first.apply_async(|_| thread::sleep(Duration::from_millis(100)), 0)?;
    second.apply_async(|_| process::exit(3), 0)?;
    first.close();
    first.join()?;
    println!("first");
    second.apply_async(|_| println!("second"), 0)?;
    second.close();
    assert!(error(second.join()).ends_with(" exited with status 3"));
    Ok("first\nsecond\n")
});

promise!(a_pool_that_is_dropped_does_its_tasks_and_ends, || {
    let mut p = Pool::new(2)?;
    p.apply_async(|_| println!("done"), 0)?;
    drop(p);
    assert!(matches!(wait(), Ok(WaitStatus::Exited(_, 1))));
    assert!(matches!(wait(), Ok(WaitStatus::Exited(_, 1))));
    Ok("done\n")
});

promise!(no_worker_goes_on_once_the_parent_has_ended, || {
    // The child makes a pool, then a process that has the pool too.
    // SAFETY: this process has one thread.
    let ForkResult::Parent { child } = unsafe { fork() }? else {
        let (read_end, write_end) = io::pipe()?;
        let mut p = Pool::new(2)?;
        drop(write_end); // so that only the workers hold it
        let task = |parent| {
            send(&GATE, 0);
            outlive(parent);
        };
        let parent = id();
        p.apply_async(task, parent)?;
        receive(&GATE);
        // SAFETY: this process has one thread.
        if let ForkResult::Parent { .. } = unsafe { fork() }? {
            thread::sleep(Duration::from_millis(100)); // so that the other worker waits for a task
            signal::raise(Signal::SIGKILL)?;
        }
        outlive(parent);
        let _ = p.apply_async(|_| println!("begun"), 0); // fails if both workers have ended
        io::read_to_string(read_end)?; // until both have ended
        process::exit(0)
    };
    let killed = WaitStatus::Signaled(child, Signal::SIGKILL, false);
    assert_eq!(waitpid(child, None)?, killed);
    Ok("")
});

promise!(signals_interrupt_neither_the_parent_nor_a_worker, || {
    extern "C" fn do_nothing(_: i32) {}
    let handler = SigHandler::Handler(do_nothing);
    // Without SA_RESTART, so that the signal interrupts calls that wait:
    let action = SigAction::new(handler, SaFlags::empty(), SigSet::empty());
    // SAFETY: the handler does nothing.
    unsafe { signal::sigaction(Signal::SIGUSR1, &action) }?;
    let signal_all = |_| {
        send(&GATE, 0);
        for _ in 0..20 {
            thread::sleep(Duration::from_millis(5));
            signal::kill(Pid::from_raw(0), Signal::SIGUSR1).unwrap();
        }
        send(&RESULTS, 0);
    };
    let mut p = Pool::new(2)?;
    p.apply_async(signal_all, 0)?;
    receive(&GATE);
    receive(&RESULTS); // meanwhile the other worker waits for a task
    for tasks in [5_000, 4_095] {
        p.apply_async(signal_all, 0)?;
        p.apply_async(signal_all, 0)?;
        receive(&GATE);
        receive(&GATE); // both workers have begun, so the pipe is empty
        for _ in 0..tasks {
            p.apply_async(|_| (), 0)?; // meanwhile the pipe is full, at 4,096 tasks
        }
    }
    p.apply_async(signal_all, 0)?;
    p.close(); // meanwhile the pipe is full
    p.join()?;
    Ok("")
});

promise!(a_pool_that_cannot_be_made_leaves_no_worker, || {
    // RLIMIT_NPROC does not hold for root. For another user, `setuid` just fails.
    // SAFETY: `setuid` can always be called.
    unsafe { libc::setuid(65_534) };
    let mut limits = libc::rlimit {
        rlim_cur: 0,
        rlim_max: 0,
    };
    // SAFETY: `getrlimit` writes `limits`, and no more.
    unsafe { libc::getrlimit(libc::RLIMIT_NPROC, &mut limits) };
    // One more process each time, so that at some limit only the second fork fails:
    limits.rlim_cur = 0;
    let p = loop {
        // SAFETY: `setrlimit` reads `limits`, and no more.
        unsafe { libc::setrlimit(libc::RLIMIT_NPROC, &limits) };
        match Pool::new(2) {
            Ok(p) => break p,
            Err(e) => assert!(e.to_string().starts_with("fork: "), "{e}"),
        }
        assert_eq!(wait(), Err(Errno::ECHILD));
        limits.rlim_cur += 1;
    };
    drop(p);
    assert!(
        wait().is_ok() && wait().is_ok(),
        "a pool without two workers"
    );
    Ok("")
});

promise!(new_says_what_is_wrong, || {
    let message = "Number of processes must be at least 1";
    assert_eq!(error(Pool::new(0)), message);
    lose_output();
    assert!(error(Pool::new(1)).starts_with("stdout: "));
    let none = libc::rlimit {
        rlim_cur: 0,
        rlim_max: 0,
    };
    // SAFETY: `setrlimit` reads `none`, and no more.
    unsafe { libc::setrlimit(libc::RLIMIT_NOFILE, &none) };
    assert!(error(Pool::new(1)).starts_with("pipe: "));
    Ok("")
});

promise!(a_misuse_is_an_error_with_pythons_message, || {
    let mut p = Pool::new(1)?;
    assert_eq!(error(p.join()), "Pool is still running");
    p.close();
    assert_eq!(error(p.apply_async(|_| (), 0)), "Pool not running");
    p.join()?;
    p.close();
    p.join()?;
    Ok("")
});

/// Pipes by which the processes of a program wait for each other, or pass numbers on.
static GATE: Pipe = LazyLock::new(|| io::pipe().unwrap());
static RESULTS: Pipe = LazyLock::new(|| io::pipe().unwrap());

type Pipe = LazyLock<(PipeReader, PipeWriter)>;

fn send(pipe: &Pipe, number: usize) {
    (&pipe.1).write_all(&number.to_ne_bytes()).unwrap();
}

fn receive(pipe: &Pipe) -> usize {
    let mut number = [0; size_of::<usize>()];
    (&pipe.0).read_exact(&mut number).unwrap();
    usize::from_ne_bytes(number)
}

fn id() -> usize {
    process::id() as usize
}

/// Waits until `parent` has ended, which is the parent of this process.
fn outlive(parent: usize) {
    while parent_id() as usize == parent {
        thread::sleep(Duration::from_millis(1));
    }
}

/// Runs the tasks in one worker, which must fail. Returns the error of `join` without the worker's
/// id.
#[track_caller]
fn failure(tasks: &[fn(usize)]) -> String {
    let send_id_and_wait: fn(usize) = |_| {
        send(&RESULTS, id());
        receive(&GATE);
    };
    let mut p = Pool::new(1).unwrap();
    for task in [&[send_id_and_wait], tasks].concat() {
        p.apply_async(task, 0).unwrap();
    }
    p.close();
    send(&GATE, 0); // only now, since a task cannot be queued when the worker has ended
    let error = error(p.join());
    let worker = format!("worker {} ", receive(&RESULTS));
    error.strip_prefix(&worker).expect(&error).to_string()
}

#[track_caller]
fn error<T: std::fmt::Debug>(result: Result<T, Box<dyn Error>>) -> String {
    result.unwrap_err().to_string()
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
    // SAFETY: each descriptor stays open, and no caller relies on what it was.
    assert_eq!(unsafe { libc::dup2(file.as_raw_fd(), fd) }, fd);
}

struct PrintsWhenDropped;

impl Drop for PrintsWhenDropped {
    fn drop(&mut self) {
        println!("dropped");
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
    LazyLock::force(&GATE); // before any fork, so that all processes have the same pipes
    LazyLock::force(&RESULTS);
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

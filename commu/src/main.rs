//! One process puts values into a queue, and another one gets them out.
//!
//! The tutorial's section 五、进程间通信 (communication between processes), `demo2/commu.py`.
//! Run it with `cargo run -p commu`.

use std::error::Error;
use std::thread;
use std::time::Duration;

use multiprocessing::{Process, Queue};
use nix::unistd::getpid;

// The code that the writing process runs:
fn write(q: &Queue) -> Result<(), Box<dyn Error>> {
    println!("Process to write: {}", getpid());
    for value in ["A", "B", "C"] {
        println!("Put {value} to queue...");
        q.put(value)?;
        thread::sleep(Duration::from_secs_f64(rand::random::<f64>()));
    }
    Ok(())
}

// The code that the reading process runs:
fn read(q: &Queue) -> Result<(), Box<dyn Error>> {
    println!("Process to read: {}", getpid());
    loop {
        let value = q.get()?;
        println!("Get {value} from queue.");
    }
}

fn main() -> Result<(), Box<dyn Error>> {
    // The parent creates the Queue, and passes it to each child:
    let q = Queue::new()?;
    let mut pw = Process::new(write, &q);
    let mut pr = Process::new(read, &q);
    // Start the child pw, to write:
    pw.start()?;
    // Start the child pr, to read:
    pr.start()?;
    // Wait for pw to end:
    pw.join()?;
    q.join()?; // otherwise pr may be terminated before it has got all values, as happens in Python
    // The process pr is in an endless loop, so it cannot be waited for, only be terminated:
    pr.terminate()?;
    Ok(())
}

/// The part of Python's `multiprocessing` that this program needs; `pub` for its tests.
pub mod multiprocessing {
    use std::cell::RefCell;
    use std::error::Error;
    use std::io::{self, PipeReader, PipeWriter, Read, Write};
    use std::panic::{self, AssertUnwindSafe};
    use std::process::{self, ExitCode, Termination};

    use nix::errno::Errno;
    use nix::libc::{_exit, PIPE_BUF};
    use nix::sys::signal::{SIGCONT, SIGTERM, kill};
    use nix::sys::wait::{WaitStatus, waitpid};
    use nix::unistd::{ForkResult, Pid, fork};

    /// A queue of strings. Any number of processes may put values. Only one may get them, and only
    /// one at a time may `join` it: otherwise values are lost or mixed, or calls wait for ever.
    ///
    /// A process that calls `get` becomes the reader, one that calls `put` or `join` a writer, and
    /// the processes that it starts afterwards have the same role. A process that has made no call
    /// counts as both: the one that made the queue, and each that was started later, even if the
    /// queue is not passed to it. While such a process lives, writers do not see that the reader
    /// has ended, nor the reader that all writers have: they may wait for ever.
    #[derive(Debug)]
    pub struct Queue {
        // Reads values, and writes the answers to `join`; `None` in a writer:
        reader: RefCell<Option<(PipeReader, PipeWriter)>>,
        // Reads the answers, and writes values; `None` in the reader:
        writer: RefCell<Option<(PipeReader, PipeWriter)>>,
    }

    /// The length in bytes of the longest value. A message is a length and a value; or, as a
    /// request from `join`, a number that no length reaches, `LONGEST` plus the caller's process
    /// id. The kernel writes up to `PIPE_BUF` bytes in one piece: messages stay whole.
    const LONGEST: usize = PIPE_BUF - size_of::<usize>();

    const NOT_BOTH: &str = "a process cannot be both the reader and a writer of a queue";
    const NO_READER: &str = "no reader of the queue is left";
    const NO_WRITER: &str = "no writer of the queue is left";

    impl Queue {
        /// Makes an empty queue. Fails if a pipe cannot be made.
        pub fn new() -> Result<Self, Box<dyn Error>> {
            let values = io::pipe().map_err(|e| format!("pipe: {e}"))?;
            let answers = io::pipe().map_err(|e| format!("pipe: {e}"))?;
            Ok(Queue {
                reader: RefCell::new(Some((values.0, answers.1))),
                writer: RefCell::new(Some((answers.0, values.1))),
            })
        }

        /// Puts a value into the queue. Waits while the pipe is full (usually at 16 long values, or
        /// thousands of short ones). Fails in the reader, if no reader is left, and if the value is
        /// longer than 4,088 bytes (4,092 on 32-bit Linux, 504 on macOS and FreeBSD).
        pub fn put(&self, value: &str) -> Result<(), Box<dyn Error>> {
            let mut writer = self.writer.borrow_mut();
            let (_, values) = writer.as_mut().ok_or(NOT_BOTH)?;
            self.reader.take(); // so that the write fails when the reader has ended
            let length = value.len();
            if length > LONGEST {
                return Err(format!("a value has at most {LONGEST} bytes, not {length}").into());
            }
            let message = [&length.to_ne_bytes(), value.as_bytes()].concat();
            values.write_all(&message).map_err(|_| NO_READER.into())
        }

        /// Takes the next value out of the queue. Waits while there is none. Fails in a writer, and
        /// once no writer is left. Do not wait for that error, since a process that has made no
        /// call counts as a writer: put a value that means the end, as in Python. Flushes stdout
        /// before it answers a `join`, and fails if it cannot.
        pub fn get(&self) -> Result<String, Box<dyn Error>> {
            let mut reader = self.reader.borrow_mut();
            let (values, answers) = reader.as_mut().ok_or(NOT_BOTH)?;
            self.writer.take(); // so that end-of-file comes when the writers have ended
            let mut number = [0; size_of::<usize>()];
            loop {
                values.read_exact(&mut number).map_err(|_| NO_WRITER)?;
                let length = usize::from_ne_bytes(number);
                if length <= LONGEST {
                    let mut value = vec![0; length];
                    values.read_exact(&mut value)?;
                    return Ok(String::from_utf8(value)?);
                }
                // `terminate` usually comes next, and SIGTERM discards what is still buffered.
                io::stdout().flush().map_err(|e| format!("stdout: {e}"))?;
                // An error means that the process in `join` was killed: go on to the next value.
                let _ = answers.write_all(&number);
            }
        }

        /// Waits until the reader has finished with all values that were put before, that is, calls
        /// `get` after the last of them (Python: `JoinableQueue.join`). Fails in the reader, and if
        /// no reader is left, even if all values have been read.
        pub fn join(&self) -> Result<(), Box<dyn Error>> {
            let mut writer = self.writer.borrow_mut();
            let (answers, values) = writer.as_mut().ok_or(NOT_BOTH)?;
            self.reader.take(); // so that the write and the read fail when the reader has ended
            let request = (LONGEST + process::id() as usize).to_ne_bytes();
            values.write_all(&request).map_err(|_| NO_READER)?;
            let mut answer = [0; size_of::<usize>()];
            // An answer to another process, which was killed in `join`, is skipped.
            while answer != request {
                answers.read_exact(&mut answer).map_err(|_| NO_READER)?;
            }
            Ok(())
        }
    }

    /// A child process that runs a function.
    ///
    /// A process that is dropped without `join` is not waited for, as with std's `Child`.
    #[derive(Debug)]
    pub struct Process<A, R> {
        target: fn(A) -> R,
        args: Option<A>, // `None` once started: the child has it, the parent's copy is dropped
        pid: Option<Pid>, // `Some` from `start` to `join`
        terminated: bool, // `true` once `terminate` has sent SIGTERM
    }

    impl<A, R: Termination> Process<A, R> {
        /// Makes a process that will call `target(args)` once it is started.
        pub fn new(target: fn(A) -> R, args: A) -> Self {
            Process {
                target,
                args: Some(args),
                pid: None,
                terminated: false,
            }
        }

        /// Starts the child, which calls the target and ends. Fails if stdout cannot be flushed or
        /// no child can be made. Panics (Python: AssertionError) if the process was started before.
        ///
        /// Call this only while the process has one thread: fork copies no other. (`start` ought to
        /// be an `unsafe fn`; it is not, to read like Python's.) A lock that the caller holds stays
        /// locked in the child. Make an async runtime only in the child.
        ///
        /// If the target returns an error or panics, the child prints that to stderr and exits with
        /// status 1 (with `panic = "abort"`, a panic kills it). It also exits with 1 if the target
        /// returns an `ExitCode` other than `SUCCESS`, or if stdout cannot be flushed. The parent
        /// drops its copy of `args`: that must not remove what the child needs, such as a file.
        pub fn start(&mut self) -> Result<(), Box<dyn Error>> {
            assert!(self.args.is_some(), "cannot start a process twice");
            // Without this, both processes would print what is still buffered.
            io::stdout().flush().map_err(|e| format!("stdout: {e}"))?;
            // SAFETY: the caller has one thread, so the child may call any function.
            match unsafe { fork() }.map_err(|e| format!("fork: {e}"))? {
                ForkResult::Child => {
                    let run = || {
                        // Without this, all children may draw the same numbers.
                        rand::rng().reseed().expect("cannot reseed");
                        // `report` prints an error, as it does for `main`.
                        self.args.take().map(self.target).map(R::report)
                    };
                    // `ended` is not dropped: a panic's payload may panic again in its drop.
                    let ended = panic::catch_unwind(AssertUnwindSafe(run));
                    let ok = matches!(ended, Ok(Some(ExitCode::SUCCESS)));
                    let flushed = io::stdout().flush().is_ok(); // since `_exit` does not flush
                    // SAFETY: `_exit` can always be called; it skips the exit handlers.
                    unsafe { _exit(if ok && flushed { 0 } else { 1 }) }
                }
                ForkResult::Parent { child } => self.pid = Some(child),
            }
            self.args = None;
            Ok(())
        }

        /// Waits for the child to end; a second call returns `Ok`. Fails unless the child's exit
        /// status is 0. Panics if the process was never started.
        pub fn join(&mut self) -> Result<(), Box<dyn Error>> {
            assert!(self.args.is_none(), "can only join a started process");
            let Some(pid) = self.pid.take() else {
                return Ok(());
            };
            loop {
                let failure = match waitpid(pid, None) {
                    Ok(WaitStatus::Exited(_, 0)) => return Ok(()),
                    Ok(WaitStatus::Signaled(_, SIGTERM, _)) if self.terminated => return Ok(()),
                    Ok(WaitStatus::Exited(_, status)) => format!("exited with status {status}"),
                    Ok(WaitStatus::Signaled(_, signal, _)) => format!("was killed by {signal}"),
                    Ok(_) | Err(Errno::EINTR) => continue, // the child has not ended yet
                    Err(e) => format!("has an unknown exit status: {e}"),
                };
                return Err(format!("process {pid} {failure}").into());
            }
        }

        /// Sends SIGTERM to the child, and waits for the child to end: for ever, if it ignores
        /// SIGTERM and runs on. Fails unless SIGTERM ended the child or its exit status is 0. Does
        /// nothing if the process was never started or has been joined.
        pub fn terminate(&mut self) -> Result<(), Box<dyn Error>> {
            let Some(pid) = self.pid else {
                return Ok(());
            };
            // A child that is stopped receives SIGTERM when SIGCONT continues it.
            let sent = kill(pid, SIGTERM).and_then(|()| kill(pid, SIGCONT));
            sent.map_err(|e| format!("process {pid} cannot be terminated: {e}"))?;
            self.terminated = true;
            self.join()
        }
    }
}
